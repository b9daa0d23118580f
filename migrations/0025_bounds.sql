-- The setup tokens of the API processes, each as the SHA-256 of what is in its state folder: the token of one counts at all of them, so
-- that it does not matter which process a balancer picks. There are none while the set-up is complete.
CREATE TABLE setup_tokens (
    hash       bytea PRIMARY KEY CHECK (octet_length(hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Summaries were merged without a bound. What is too large to be a list of facts is left out until the device reports again.
UPDATE device_details SET summary = '{}' WHERE octet_length(summary::text) > 65536;
