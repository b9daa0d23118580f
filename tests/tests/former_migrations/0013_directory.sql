-- Directories (LDAP, Active Directory) whose people may sign in.
CREATE TABLE directory_providers (
    id                     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                   text NOT NULL CHECK (name <> ''),
    provider_type          text NOT NULL DEFAULT 'ldap' CHECK (provider_type IN ('ldap', 'active_directory')),
    enabled                boolean NOT NULL DEFAULT false,
    priority               integer NOT NULL DEFAULT 100,
    domain_suffix          text NOT NULL DEFAULT '',
    server_urls            text[] NOT NULL DEFAULT '{}',
    -- {"fully.qualified.name": "address"}
    host_overrides         jsonb NOT NULL DEFAULT '{}',
    use_ldaps              boolean NOT NULL DEFAULT false,
    tls_required           boolean NOT NULL DEFAULT true,
    tls_ca_pem             text NOT NULL DEFAULT '',
    base_dn                text NOT NULL DEFAULT '',
    bind_dn                text NOT NULL DEFAULT '',
    -- Sealed under Aegis.
    bind_password_sealed   text,
    user_search_filter     text NOT NULL DEFAULT '',
    username_attribute     text NOT NULL DEFAULT '',
    display_name_attribute text NOT NULL DEFAULT '',
    email_attribute        text NOT NULL DEFAULT '',
    member_of_attribute    text NOT NULL DEFAULT '',
    group_search_base_dn   text NOT NULL DEFAULT '',
    nested_groups          boolean NOT NULL DEFAULT true,
    kerberos_realm         text NOT NULL DEFAULT '',
    kerberos_kdc           text NOT NULL DEFAULT '',
    -- Sealed under Aegis.
    kerberos_keytab_sealed text,
    sync_interval_seconds  integer NOT NULL DEFAULT 60 CHECK (sync_interval_seconds >= 60),
    last_sync_at           timestamptz,
    last_sync_status       text NOT NULL DEFAULT '',
    last_sync_message      text NOT NULL DEFAULT '',
    -- A process that syncs has it until then.
    sync_claimed_until     timestamptz,
    last_test_at           timestamptz,
    last_test_status       text NOT NULL DEFAULT '',
    last_test_message      text NOT NULL DEFAULT '',
    created_at             timestamptz NOT NULL DEFAULT now(),
    updated_at             timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX directory_providers_name_key ON directory_providers (lower(name));

-- Which group makes its members what.
CREATE TABLE directory_group_mappings (
    provider_id bigint NOT NULL REFERENCES directory_providers (id) ON DELETE CASCADE,
    position    integer NOT NULL,
    group_dn    text NOT NULL,
    role        text NOT NULL CHECK (role IN ('Admin', 'User')),
    PRIMARY KEY (provider_id, position)
);

-- Which groups see which sites.
CREATE TABLE directory_site_mappings (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    provider_id bigint NOT NULL REFERENCES directory_providers (id) ON DELETE CASCADE,
    position    integer NOT NULL,
    label       text NOT NULL,
    group_dns   text[] NOT NULL,
    UNIQUE (provider_id, position)
);
CREATE TABLE directory_mapped_sites (
    mapping_id bigint NOT NULL REFERENCES directory_site_mappings (id) ON DELETE CASCADE,
    site_id    bigint NOT NULL REFERENCES sites (id) ON DELETE CASCADE,
    PRIMARY KEY (mapping_id, site_id)
);
CREATE INDEX directory_mapped_sites_site ON directory_mapped_sites (site_id);

-- A person of a directory, as last seen there. The subject is what stays the same when the person is renamed.
ALTER TABLE users
    ADD COLUMN directory_subject text,
    ADD COLUMN directory_domain text NOT NULL DEFAULT '',
    ADD COLUMN directory_dn text NOT NULL DEFAULT '',
    ADD COLUMN directory_groups text[] NOT NULL DEFAULT '{}',
    ADD COLUMN directory_last_sync_at timestamptz,
    ADD COLUMN directory_disabled_at timestamptz,
    ADD CONSTRAINT users_directory_provider_fkey FOREIGN KEY (directory_provider_id) REFERENCES directory_providers (id);
CREATE UNIQUE INDEX users_directory_subject_key ON users (directory_provider_id, directory_subject);
