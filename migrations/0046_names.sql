-- Names are compared by keys that the engine computes (NFC, Unicode simple case folding) and stores beside them: the locale of the
-- database has no say. SQL cannot compute them. Rows from before get chr(31) and the name as it is written; the engine replaces that
-- after the migrations, and leaves it where another row has the key already.

ALTER TABLE users ADD COLUMN username_key text COLLATE "C";
UPDATE users SET username_key = chr(31) || username;
ALTER TABLE users ALTER COLUMN username_key SET NOT NULL;
DROP INDEX users_username_key;
CREATE UNIQUE INDEX users_username_key ON users (username_key);

ALTER TABLE sites ADD COLUMN name_key text COLLATE "C";
UPDATE sites SET name_key = chr(31) || name;
ALTER TABLE sites ALTER COLUMN name_key SET NOT NULL;
DROP INDEX sites_name_key;
CREATE UNIQUE INDEX sites_name_key ON sites (name_key);

ALTER TABLE credentials ADD COLUMN name_key text COLLATE "C";
UPDATE credentials SET name_key = chr(31) || name;
ALTER TABLE credentials ALTER COLUMN name_key SET NOT NULL;
DROP INDEX credentials_name_key;
CREATE UNIQUE INDEX credentials_name_key ON credentials (name_key);

ALTER TABLE directory_providers ADD COLUMN name_key text COLLATE "C";
UPDATE directory_providers SET name_key = chr(31) || name;
ALTER TABLE directory_providers ALTER COLUMN name_key SET NOT NULL;
DROP INDEX directory_providers_name_key;
CREATE UNIQUE INDEX directory_providers_name_key ON directory_providers (name_key);

-- The hostname is the one that an operator (or the site's auto-approval) has approved. What the agent says is beside it, empty
-- until it says something.
ALTER TABLE devices ADD COLUMN hostname_key text COLLATE "C",
    ADD COLUMN reported_hostname text NOT NULL DEFAULT '',
    ADD COLUMN reported_hostname_key text COLLATE "C" NOT NULL DEFAULT '',
    -- When a change of it was last written to the audit.
    ADD COLUMN reported_hostname_event_at timestamptz;
UPDATE devices SET hostname_key = chr(31) || hostname;
ALTER TABLE devices ALTER COLUMN hostname_key SET NOT NULL;
DROP INDEX devices_hostname;
CREATE INDEX devices_hostname ON devices (hostname_key, guid);

ALTER TABLE device_approvals ADD COLUMN hostname_claimed_key text COLLATE "C";
UPDATE device_approvals SET hostname_claimed_key = chr(31) || hostname_claimed;
ALTER TABLE device_approvals ALTER COLUMN hostname_claimed_key SET NOT NULL;

-- The audit cannot be updated: events from before have no key and are found by the rule of the database.
ALTER TABLE audit_events ADD COLUMN actor_name_key text COLLATE "C" NOT NULL DEFAULT '';
DROP INDEX audit_events_actor;
CREATE INDEX audit_events_actor ON audit_events (actor_name_key, id DESC) WHERE actor_name_key <> '';
CREATE INDEX audit_events_actor_before_keys ON audit_events (lower(actor_name), id DESC) WHERE actor_name_key = '';

-- Whether a device can be worked with, by the database's clock. A device is online while its agent has a socket at an API process that
-- lives, or has reported within 60 seconds and not said good-bye since. Work goes over the socket: one that reports without one is
-- online and gets none.
CREATE VIEW device_presence AS
SELECT d.guid, s.agent_socket, s.agent_socket OR s.reports AS online,
       CASE WHEN s.agent_socket THEN 'connected' WHEN s.reports THEN 'no_socket' ELSE 'offline' END AS connection_state
FROM devices d
LEFT JOIN (device_sockets k JOIN api_processes p ON p.id = k.api_process AND p.last_seen_at > now() - interval '15 seconds')
    ON k.device_guid = d.guid AND k.service_mode = 'system'
CROSS JOIN LATERAL (SELECT p.id IS NOT NULL AS agent_socket,
                           d.left_at IS NULL AND coalesce(d.last_seen > now() - interval '60 seconds', false) AS reports) s;
