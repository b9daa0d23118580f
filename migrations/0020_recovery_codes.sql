-- Recovery codes: each stands once for the authenticator app. Only their SHA-256 is kept; they have 80 random bits.
CREATE TABLE recovery_codes (
    user_id   bigint NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    code_hash bytea NOT NULL CHECK (length(code_hash) = 32),
    made_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, code_hash)
);

-- They go with the second factor they stand for, whoever forgets it and by whatever way.
CREATE FUNCTION forget_recovery_codes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM recovery_codes WHERE user_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER forget_recovery_codes AFTER UPDATE OF mfa_secret_sealed ON users
    FOR EACH ROW WHEN (OLD.mfa_secret_sealed IS DISTINCT FROM NEW.mfa_secret_sealed) EXECUTE FUNCTION forget_recovery_codes();
