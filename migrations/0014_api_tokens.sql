-- API tokens: what a program signs in with, in the name of its owner. Only the SHA-256 of the token is kept.
CREATE TABLE api_tokens (
    id           uuid PRIMARY KEY,
    user_id      bigint NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 80),
    token_hash   bytea NOT NULL CONSTRAINT api_tokens_token_hash_key UNIQUE CHECK (length(token_hash) = 32),
    -- The last characters of the token, by which its owner knows it again.
    hint         text NOT NULL CHECK (char_length(hint) = 4),
    scopes       text[] NOT NULL CHECK (
        cardinality(scopes) > 0 AND scopes <@ ARRAY['read', 'assemblies:write', 'devices:write', 'jobs:write', 'sites:write']),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL CHECK (expires_at > created_at),
    last_used_at timestamptz,
    last_used_ip text NOT NULL DEFAULT ''
);
CREATE INDEX api_tokens_user ON api_tokens (user_id);
