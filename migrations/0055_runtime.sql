-- Runs that belong to one place: only workers of that place take them.
ALTER TABLE workflow_runs ADD COLUMN place text NOT NULL DEFAULT '';

CREATE FUNCTION workflow_queue(workflow text, version integer, place text) RETURNS text IMMUTABLE LANGUAGE sql AS $$
    SELECT workflow || '.v' || version || CASE WHEN place = '' THEN '' ELSE '@' || place END
$$;

-- Waits that any child ends. What the run has been told of is counted, so that none that ends between two waits is missed.
ALTER TABLE workflow_runs
    ADD COLUMN wait_any boolean NOT NULL DEFAULT false,
    ADD COLUMN ended_children integer NOT NULL DEFAULT 0,
    ADD COLUMN told_children integer NOT NULL DEFAULT 0;

-- What a step says while it runs, in order for each attempt.
CREATE TABLE workflow_output (
    run_id uuid NOT NULL,
    step_seq integer NOT NULL,
    attempt integer NOT NULL,
    n bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    kind text NOT NULL,
    data jsonb NOT NULL,
    PRIMARY KEY (run_id, step_seq, attempt, n)
);

CREATE OR REPLACE FUNCTION workflow_events_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM workflow_events e USING gone WHERE e.run_id = gone.id;
    DELETE FROM workflow_output o USING gone WHERE o.run_id = gone.id;
    RETURN NULL;
END $$;
