-- The token GitHub is asked with; at most one row.
CREATE TABLE github_token (
    id           smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    -- Sealed under Aegis; none after a reset of the secret store has taken it.
    token_sealed text,
    -- The last four characters, to tell one token from another.
    hint         text NOT NULL DEFAULT '',
    reset_at     timestamptz,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    CHECK ((token_sealed IS NULL) = (reset_at IS NOT NULL))
);
