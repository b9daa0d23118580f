-- Devices: enrollment, identity, tokens, inventory.

CREATE TABLE devices (
    guid                uuid PRIMARY KEY,
    hostname            text NOT NULL CHECK (hostname <> '' AND length(hostname) <= 253),
    site_id             bigint REFERENCES sites (id) ON DELETE SET NULL,
    agent_id            text NOT NULL DEFAULT '',
    status              text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'quarantined', 'revoked', 'decommissioned')),
    fingerprint         text NOT NULL,
    public_key          bytea NOT NULL,
    token_version       integer NOT NULL DEFAULT 1 CHECK (token_version >= 1),
    description         text NOT NULL DEFAULT '',
    created_at          timestamptz NOT NULL DEFAULT now(),
    last_enrollment_at  timestamptz NOT NULL DEFAULT now(),
    key_added_at        timestamptz NOT NULL DEFAULT now(),
    last_seen           timestamptz,
    agent_build_id      text NOT NULL DEFAULT '',
    device_type         text NOT NULL DEFAULT '',
    domain              text NOT NULL DEFAULT '',
    external_ip         text NOT NULL DEFAULT '',
    internal_ip         text NOT NULL DEFAULT '',
    last_reboot         text NOT NULL DEFAULT '',
    last_user           text NOT NULL DEFAULT '',
    operating_system    text NOT NULL DEFAULT '',
    uptime              bigint NOT NULL DEFAULT 0,
    cpu_percent         double precision,
    memory_percent      double precision,
    connection_type     text NOT NULL DEFAULT '',
    connection_endpoint text NOT NULL DEFAULT '',
    agent_release_channel text NOT NULL DEFAULT '',
    agent_branch        text NOT NULL DEFAULT ''
) WITH (fillfactor = 70); -- every heartbeat rewrites the row in place
-- Hostnames may repeat, across sites and within one; they are labels.
CREATE INDEX devices_hostname ON devices (lower(hostname));
CREATE INDEX devices_site ON devices (site_id);
-- A key belongs to one device.
CREATE UNIQUE INDEX devices_fingerprint_key ON devices (fingerprint);

-- The large, rarely read documents of a device, apart from the row every heartbeat touches.
CREATE TABLE device_details (
    device_guid uuid PRIMARY KEY REFERENCES devices (guid) ON DELETE CASCADE,
    summary     jsonb NOT NULL DEFAULT '{}',
    memory      jsonb NOT NULL DEFAULT '[]',
    network     jsonb NOT NULL DEFAULT '[]',
    software    jsonb NOT NULL DEFAULT '[]',
    services    jsonb NOT NULL DEFAULT '[]',
    storage     jsonb NOT NULL DEFAULT '[]',
    cpu         jsonb NOT NULL DEFAULT '{}',
    sessions    jsonb NOT NULL DEFAULT '[]',
    processes   jsonb NOT NULL DEFAULT '[]',
    role_health jsonb NOT NULL DEFAULT '{}',
    agent_update jsonb NOT NULL DEFAULT '{}',
    status_signature bytea,
    status_accepted_at timestamptz,
    status_event_at timestamptz,
    details_hash bytea,
    details_accepted_at timestamptz,
    services_reported_at timestamptz,
    sessions_reported_at timestamptz,
    processes_reported_at timestamptz
);

-- One row per open agent socket; rebuilt by reconnection.
CREATE TABLE device_sockets (
    device_guid     uuid NOT NULL REFERENCES devices (guid) ON DELETE CASCADE,
    service_mode    text NOT NULL CHECK (service_mode IN ('system', 'currentuser')),
    socket_id       text NOT NULL,
    api_process     uuid NOT NULL,
    agent_id        text NOT NULL DEFAULT '',
    hostname        text NOT NULL DEFAULT '',
    helper_contexts text[] NOT NULL DEFAULT '{}',
    capabilities    jsonb NOT NULL DEFAULT '{}',
    connected_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (device_guid, service_mode)
);
CREATE INDEX device_sockets_process ON device_sockets (api_process);

-- API processes that are alive; a row whose last_seen_at is old owns no sockets.
CREATE TABLE api_processes (
    id           uuid PRIMARY KEY,
    started_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now()
);

-- Messages between API processes that are too long for a notification; kept for a minute.
CREATE TABLE socket_attachments (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload    bytea NOT NULL
);
CREATE INDEX socket_attachments_created ON socket_attachments (created_at);

CREATE TABLE device_keys (
    device_guid uuid NOT NULL REFERENCES devices (guid) ON DELETE CASCADE,
    fingerprint text NOT NULL,
    added_at    timestamptz NOT NULL DEFAULT now(),
    retired_at  timestamptz,
    PRIMARY KEY (device_guid, fingerprint)
);

CREATE TABLE refresh_tokens (
    id           uuid PRIMARY KEY,
    device_guid  uuid NOT NULL REFERENCES devices (guid) ON DELETE CASCADE,
    -- Tokens of one enrollment share a family; reuse of a rotated one revokes them all.
    family       uuid NOT NULL,
    token_hash   bytea NOT NULL CONSTRAINT refresh_tokens_token_hash_key UNIQUE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    last_used_at timestamptz,
    rotated_at   timestamptz,
    -- The token the rotation gave out.
    replaced_by  uuid,
    revoked_at   timestamptz
);
CREATE INDEX refresh_tokens_device ON refresh_tokens (device_guid);
CREATE INDEX refresh_tokens_family ON refresh_tokens (family);
CREATE INDEX refresh_tokens_expires ON refresh_tokens (expires_at);

CREATE TABLE device_approvals (
    id                 uuid PRIMARY KEY,
    approval_reference uuid NOT NULL CONSTRAINT device_approvals_reference_key UNIQUE,
    device_guid        uuid,
    hostname_claimed   text NOT NULL CHECK (hostname_claimed <> '' AND length(hostname_claimed) <= 253),
    fingerprint        text NOT NULL,
    public_key         bytea NOT NULL,
    enrollment_code    text NOT NULL,
    site_id            bigint REFERENCES sites (id) ON DELETE CASCADE,
    status             text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'approved', 'denied', 'expired', 'completed')),
    client_nonce       bytea NOT NULL,
    server_nonce       bytea NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now(),
    updated_at         timestamptz NOT NULL DEFAULT now(),
    decided_at         timestamptz,
    completed_at       timestamptz,
    -- A user id, `site_auto_approval` or `system`.
    approved_by_user_id text,
    approved_by_username text,
    conflict_resolution text,
    -- Whether an administrator decided: only then may the device change sites, or a revoked one come back.
    decided_as_admin   boolean NOT NULL DEFAULT false,
    reinstate          boolean NOT NULL DEFAULT false,
    remote_addr        text NOT NULL DEFAULT '',
    onboarding_job_id  bigint,
    onboarding_run_id  bigint,
    onboarding_target  text NOT NULL DEFAULT ''
);
-- A key has one open request.
CREATE UNIQUE INDEX device_approvals_open ON device_approvals (fingerprint) WHERE status IN ('pending', 'approved');
CREATE INDEX device_approvals_site ON device_approvals (site_id, status);
CREATE INDEX device_approvals_status ON device_approvals (status, created_at);
CREATE INDEX device_approvals_fingerprint ON device_approvals (fingerprint, status);

CREATE TABLE enrollment_code_failures (
    fingerprint      text PRIMARY KEY,
    hostname_claimed text NOT NULL,
    code_mask        text NOT NULL,
    remote_addr      text NOT NULL DEFAULT '',
    first_seen_at    timestamptz NOT NULL DEFAULT now(),
    last_seen_at     timestamptz NOT NULL DEFAULT now(),
    attempt_count    integer NOT NULL DEFAULT 1
);
CREATE INDEX enrollment_code_failures_seen ON enrollment_code_failures (last_seen_at);

CREATE TABLE device_purge_barriers (
    guid                   uuid PRIMARY KEY,
    required_token_version integer NOT NULL,
    purged_at              timestamptz NOT NULL DEFAULT now(),
    purged_by              text NOT NULL DEFAULT '',
    last_hostname          text NOT NULL DEFAULT '',
    last_agent_id          text NOT NULL DEFAULT ''
);
