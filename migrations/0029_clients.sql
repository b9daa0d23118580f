-- What agents of other makers cannot do, and what they send that was not kept.

-- Whether the agent that a script was sent to can stop it when asked. One that cannot is not waited for when the run is cancelled
-- or reaches its stop-after.
ALTER TABLE activity_history ADD COLUMN agent_cancels boolean NOT NULL DEFAULT true;

-- The values of a device's numbered fields, as its agent sends them with heartbeats; a field without a row has never had one.
-- An empty value is one that was cleared.
CREATE TABLE device_metadata_fields (
    device_guid  uuid NOT NULL REFERENCES devices (guid) ON DELETE CASCADE,
    field_number smallint NOT NULL CHECK (field_number BETWEEN 1 AND 500),
    value        text NOT NULL CHECK (length(value) <= 1024),
    -- When it was set, by the clock of the one who set it; the newest wins.
    modified_at  timestamptz NOT NULL,
    source       text NOT NULL DEFAULT 'agent' CHECK (length(source) <= 64),
    actor        text NOT NULL DEFAULT '' CHECK (length(actor) <= 255),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (device_guid, field_number)
);
