-- How far the audit has been told to the webhook: the last link of the chain that it has acknowledged. At most one row.
CREATE TABLE audit_webhook (
    id  smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    seq bigint NOT NULL DEFAULT 0
);
INSERT INTO audit_webhook DEFAULT VALUES;
