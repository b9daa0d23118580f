-- What the devices of an occurrence are sent, once for all of them: everything in a dispatch that is not a device's own. An
-- activity's request has the rest; one without an occurrence (a quick run, or from before this) has all of it.
CREATE TABLE occurrence_scripts (
    occurrence_id   bigint NOT NULL REFERENCES job_occurrences (id) ON DELETE CASCADE,
    component_index integer NOT NULL,
    request         jsonb NOT NULL,
    -- The length of the request as text.
    bytes           integer NOT NULL,
    PRIMARY KEY (occurrence_id, component_index)
);

-- Cancels to be passed on: few, and looked for with every delivery.
CREATE INDEX activity_history_cancels ON activity_history (device_guid)
    WHERE delivery IN ('sent', 'accepted') AND cancel_requested_at IS NOT NULL;

-- How the runs of a closed occurrence ended, so that a list need not count them: one object for each status and site, null when
-- there are too many or it was closed before this. All runs of a closed occurrence are final.
ALTER TABLE job_occurrences ADD COLUMN results jsonb;

-- A page of devices begins where the one before ended.
CREATE INDEX devices_page ON devices (lower(hostname), guid);
DROP INDEX devices_hostname;
