-- The audit can be read, and cannot be changed unnoticed.

-- Each event is bound to the one before it, in the order they were sealed, by a tag under a key that is not in the database.
CREATE TABLE audit_chain (
    seq      bigint PRIMARY KEY CHECK (seq >= 1),
    event_id bigint NOT NULL CONSTRAINT audit_chain_event_key UNIQUE,
    tag      bytea NOT NULL CHECK (length(tag) = 32)
);
-- Events that wait to be sealed. Events are written by many transactions at once and none waits for another; sealing, one
-- process at a time, comes a moment later.
CREATE TABLE audit_unsealed (
    event_id bigint PRIMARY KEY
);
INSERT INTO audit_unsealed SELECT id FROM audit_events;

CREATE INDEX audit_events_object ON audit_events (object_kind, object_id, id DESC);
CREATE INDEX audit_events_actor ON audit_events (lower(actor_name), id DESC);
CREATE INDEX audit_events_action ON audit_events (action text_pattern_ops, id DESC);

CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_chain_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_chain
    FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only();

-- All that an event says, as one text that is the same whatever the settings of the session.
CREATE FUNCTION audit_text(event audit_events) RETURNS text STABLE LANGUAGE sql AS $$
    SELECT jsonb_build_array(event.id, extract(epoch FROM event.at), event.actor_kind, event.actor_id, event.actor_name, event.ip,
                             event.action, event.object_kind, event.object_id, event.site_id, event.outcome, event.detail)::text
$$;
