-- The one rule of when a device is online, in a form that joins: a list of thousands is read by one pass over each table, and a page still
-- by key. A device has at most one socket of a mode, so the join adds no rows.
CREATE VIEW live_system_sockets AS
SELECT k.device_guid
FROM device_sockets k JOIN api_processes p ON p.id = k.api_process
WHERE k.service_mode = 'system' AND p.last_seen_at > now() - interval '15 seconds';

CREATE FUNCTION presence(agent_socket boolean, last_seen timestamptz, left_at timestamptz)
RETURNS TABLE (online boolean, connection_state text) STABLE LANGUAGE sql AS $$
    SELECT agent_socket OR r.reports,
           CASE WHEN agent_socket THEN 'connected' WHEN r.reports THEN 'no_socket' ELSE 'offline' END
    FROM (SELECT left_at IS NULL AND coalesce(last_seen > now() - interval '60 seconds', false) AS reports) r
$$;

CREATE OR REPLACE VIEW device_presence AS
SELECT d.guid, k.device_guid IS NOT NULL AS agent_socket, p.online, p.connection_state
FROM devices d
LEFT JOIN live_system_sockets k ON k.device_guid = d.guid
CROSS JOIN LATERAL presence(k.device_guid IS NOT NULL, d.last_seen, d.left_at) AS p;

DROP FUNCTION device_presence_of(uuid, timestamptz, timestamptz);
