-- The data key of the secret store on its way from one API process to another: sealed to a key that only the memory of the asking
-- process holds. Rows live for seconds.
CREATE TABLE aegis_handovers (
    process_id uuid PRIMARY KEY,
    public_key bytea NOT NULL CHECK (octet_length(public_key) = 32),
    asked_at   timestamptz NOT NULL DEFAULT now(),
    -- Which data key is in the answer.
    key_id     uuid,
    answer     bytea,
    CHECK ((key_id IS NULL) = (answer IS NULL))
);
