-- What playbooks and remote tasks sign in with. Each secret is sealed under the Aegis key, bound to its row and column.
CREATE TABLE credentials (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name              text NOT NULL CHECK (name <> '' AND length(name) <= 200),
    description       text NOT NULL DEFAULT '' CHECK (length(description) <= 2000),
    -- Null: every operator sees it and every site may use it.
    site_id           bigint CONSTRAINT credentials_site_fkey REFERENCES sites (id),
    credential_type   text NOT NULL DEFAULT 'machine' CHECK (credential_type IN ('machine', 'domain', 'token')),
    connection_type   text NOT NULL DEFAULT 'ssh' CHECK (connection_type IN ('ssh', 'windows', 'winrm')),
    username          text NOT NULL DEFAULT '' CHECK (length(username) <= 256),
    password_sealed               text,
    private_key_sealed            text,
    private_key_passphrase_sealed text,
    become_method     text NOT NULL DEFAULT '' CHECK (length(become_method) <= 64),
    become_username   text NOT NULL DEFAULT '' CHECK (length(become_username) <= 256),
    become_password_sealed        text,
    metadata          jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    -- Secrets that a reset of the secret store took and nobody has set again; while there are any, it must not be used.
    lost_secret_fields text[] NOT NULL DEFAULT '{}',
    reset_at          timestamptz,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    CHECK (lost_secret_fields = '{}' OR reset_at IS NOT NULL)
);
CREATE UNIQUE INDEX credentials_name_key ON credentials (lower(name));
CREATE INDEX credentials_site ON credentials (site_id) WHERE site_id IS NOT NULL;

-- A job holds its credential: one that is in use cannot be deleted.
ALTER TABLE scheduled_jobs ADD CONSTRAINT scheduled_jobs_credential_fkey FOREIGN KEY (credential_id) REFERENCES credentials (id);
CREATE INDEX scheduled_jobs_credential ON scheduled_jobs (credential_id) WHERE credential_id IS NOT NULL;
