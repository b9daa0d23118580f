-- When something of a device last changed, but for what its heartbeats change: for lists of what has changed since the one before.
-- Heartbeats leave it as it is, so that they go on rewriting the row in place although it is indexed.
ALTER TABLE devices ADD COLUMN changed_at timestamptz NOT NULL DEFAULT now();
CREATE INDEX devices_changed ON devices (changed_at);

CREATE FUNCTION device_changed() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    NEW.changed_at := clock_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER device_changed BEFORE UPDATE ON devices FOR EACH ROW
    WHEN ((OLD.hostname, OLD.reported_hostname, OLD.site_id, OLD.agent_id, OLD.status, OLD.description, OLD.last_enrollment_at,
           OLD.agent_build_id, OLD.device_type, OLD.domain, OLD.external_ip, OLD.internal_ip, OLD.last_reboot, OLD.last_user,
           OLD.operating_system, OLD.connection_type, OLD.connection_endpoint, OLD.agent_release_channel, OLD.agent_branch)
          IS DISTINCT FROM
          (NEW.hostname, NEW.reported_hostname, NEW.site_id, NEW.agent_id, NEW.status, NEW.description, NEW.last_enrollment_at,
           NEW.agent_build_id, NEW.device_type, NEW.domain, NEW.external_ip, NEW.internal_ip, NEW.last_reboot, NEW.last_user,
           NEW.operating_system, NEW.connection_type, NEW.connection_endpoint, NEW.agent_release_channel, NEW.agent_branch))
    EXECUTE FUNCTION device_changed();
