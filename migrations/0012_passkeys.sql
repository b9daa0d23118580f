-- Passkeys (WebAuthn): what an authenticator registered for a user.
CREATE TABLE passkeys (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      bigint NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    label        text NOT NULL CHECK (char_length(label) BETWEEN 1 AND 80),
    -- A tag of the credential's id under a sub-key of Aegis: it is found by what only its authenticator presents.
    lookup_tag   bytea NOT NULL CONSTRAINT passkeys_lookup_tag_key UNIQUE CHECK (length(lookup_tag) = 32),
    -- Sealed under Aegis: id, public key and signature counter of the credential.
    credential_sealed text NOT NULL,
    transports   text[] NOT NULL DEFAULT '{}',
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
CREATE INDEX passkeys_user ON passkeys (user_id);
