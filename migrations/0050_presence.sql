-- The one rule of when a device is online, as a function of its row, so that a query that has the row need not read it again: joined to the
-- view, a page of a hundred devices read all of them. The socket is looked up by its key, whatever the planner takes the table's size for.
CREATE FUNCTION device_presence_of(device uuid, last_seen timestamptz, left_at timestamptz)
RETURNS TABLE (agent_socket boolean, online boolean, connection_state text) STABLE LANGUAGE sql AS $$
    SELECT s.agent_socket, s.agent_socket OR s.reports,
           CASE WHEN s.agent_socket THEN 'connected' WHEN s.reports THEN 'no_socket' ELSE 'offline' END
    FROM (SELECT EXISTS (SELECT FROM device_sockets k JOIN api_processes p ON p.id = k.api_process
                         WHERE k.device_guid = device AND k.service_mode = 'system'
                           AND p.last_seen_at > now() - interval '15 seconds') AS agent_socket,
                 left_at IS NULL AND coalesce(last_seen > now() - interval '60 seconds', false) AS reports
          OFFSET 0) s
$$;

CREATE OR REPLACE VIEW device_presence AS
SELECT d.guid, p.agent_socket, p.online, p.connection_state
FROM devices d CROSS JOIN LATERAL device_presence_of(d.guid, d.last_seen, d.left_at) AS p;
