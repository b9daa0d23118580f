-- Access: operators, sessions, challenges, the Aegis key, signing keys, audit.

CREATE TABLE sites (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name             text NOT NULL CHECK (name <> '' AND length(name) <= 200),
    description      text NOT NULL DEFAULT '' CHECK (length(description) <= 2000),
    enrollment_code  text NOT NULL CONSTRAINT sites_enrollment_code_key UNIQUE,
    auto_approve_until timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX sites_name_key ON sites (lower(name));

CREATE TABLE users (
    id                  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username            text NOT NULL CHECK (username <> '' AND length(username) <= 128),
    display_name        text NOT NULL DEFAULT '' CHECK (length(display_name) <= 200),
    role                text NOT NULL CHECK (role IN ('Admin', 'User')),
    -- Sealed under the Aegis key: an Argon2id verifier over the SHA-512 hex of the password.
    password_sealed     text,
    -- Sealed under the Aegis key: the base32 TOTP secret.
    mfa_secret_sealed   text,
    mfa_disabled        boolean NOT NULL DEFAULT false,
    -- The last TOTP step accepted, so that a code works once.
    mfa_last_step       bigint NOT NULL DEFAULT 0,
    auth_reset_required boolean NOT NULL DEFAULT false,
    -- Somebody else has set the password: the user must choose one before anything else.
    password_change_required boolean NOT NULL DEFAULT false,
    auth_source         text NOT NULL DEFAULT 'local' CHECK (auth_source IN ('local', 'directory')),
    directory_provider_id bigint,
    directory_disabled  boolean NOT NULL DEFAULT false,
    last_login          timestamptz,
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX users_username_key ON users (lower(username));

CREATE TABLE user_site_assignments (
    user_id     bigint NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    site_id     bigint NOT NULL REFERENCES sites (id) ON DELETE CASCADE,
    assigned_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, site_id)
);
CREATE INDEX user_site_assignments_site ON user_site_assignments (site_id);

-- An operator's session. Only the SHA-256 of the token is kept.
CREATE TABLE operator_sessions (
    id           uuid PRIMARY KEY,
    user_id      bigint NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    token_hash   bytea NOT NULL CONSTRAINT operator_sessions_token_hash_key UNIQUE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    stepped_up_at timestamptz,
    ip           text NOT NULL DEFAULT '',
    user_agent   text NOT NULL DEFAULT ''
);
CREATE INDEX operator_sessions_user ON operator_sessions (user_id);
CREATE INDEX operator_sessions_expires ON operator_sessions (expires_at);

-- What a person has begun and not yet proven: an MFA step, the set-up of the first administrator.
CREATE TABLE auth_challenges (
    id          uuid PRIMARY KEY,
    token_hash  bytea NOT NULL CONSTRAINT auth_challenges_token_hash_key UNIQUE,
    purpose     text NOT NULL CHECK (purpose IN ('mfa', 'bootstrap_admin', 'passkey_register', 'passkey_authenticate')),
    user_id     bigint REFERENCES users (id) ON DELETE CASCADE,
    -- Sealed under the Aegis key: what the purpose needs (a new TOTP secret, a password verifier).
    state_sealed text NOT NULL,
    failures    integer NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    used_at     timestamptz
);
CREATE INDEX auth_challenges_expires ON auth_challenges (expires_at);

-- Attempts counted for rate limits and lockout; one row per (scope, subject, window start).
CREATE TABLE rate_counters (
    scope        text NOT NULL,
    subject      text NOT NULL,
    window_start timestamptz NOT NULL,
    hits         integer NOT NULL DEFAULT 0,
    PRIMARY KEY (scope, subject, window_start)
);
CREATE INDEX rate_counters_window ON rate_counters (window_start);

-- The data key of everything sealed, itself wrapped by the operator's passphrase. One row.
CREATE TABLE aegis (
    id            smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    kdf           jsonb NOT NULL,
    wrapped_key   bytea NOT NULL,
    unseal_wrapped_key bytea,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);

-- Everything an operator, a device or the engine itself changed. Append-only.
CREATE TABLE audit_events (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL DEFAULT now(),
    actor_kind  text NOT NULL CHECK (actor_kind IN ('anonymous', 'operator', 'device', 'worker', 'system')),
    actor_id    text NOT NULL DEFAULT '',
    actor_name  text NOT NULL DEFAULT '',
    ip          text NOT NULL DEFAULT '',
    action      text NOT NULL,
    object_kind text NOT NULL DEFAULT '',
    object_id   text NOT NULL DEFAULT '',
    site_id     bigint,
    outcome     text NOT NULL CHECK (outcome IN ('success', 'failure')),
    detail      jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_events_at ON audit_events (at DESC);

-- Answers kept for 24 h under the client's Idempotency-Key, written with their effect.
CREATE TABLE idempotency_keys (
    actor      text NOT NULL,
    key        text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_hash  bytea NOT NULL,
    status     smallint NOT NULL,
    response   jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, key)
);
CREATE INDEX idempotency_keys_created ON idempotency_keys (created_at);

-- Nonces of internal requests, so that each is accepted once.
CREATE TABLE internal_nonces (
    nonce   text PRIMARY KEY,
    seen_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX internal_nonces_seen ON internal_nonces (seen_at);
