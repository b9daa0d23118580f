-- The hot path of the durable runtime: fewer writes for each step, one statement for each outcome, and wake-ups only for
-- workers that sleep.

-- One history. The journal becomes those events that tell of a committed step; they carry its number and its output.
ALTER TABLE workflow_events ADD COLUMN step_seq integer, ADD COLUMN output jsonb;
UPDATE workflow_events e SET step_seq = m.step_seq, output = m.output
FROM (
    SELECT ev.run_id, ev.seq, j.seq AS step_seq, j.output
    FROM (SELECT run_id, seq, step, attempt, worker, row_number() OVER (PARTITION BY run_id, step, attempt, worker ORDER BY seq) AS nth
          FROM workflow_events WHERE kind IN ('step_committed', 'waiting', 'cancelling', 'succeeded', 'cancelled')) ev
    JOIN (SELECT *, row_number() OVER (PARTITION BY run_id, step, attempt, worker ORDER BY seq) AS nth FROM workflow_journal) j
        ON (j.run_id, j.step, j.attempt, j.worker, j.nth) = (ev.run_id, ev.step, ev.attempt, ev.worker, ev.nth)
) m WHERE (e.run_id, e.seq) = (m.run_id, m.seq);
DROP TABLE workflow_journal;
CREATE VIEW workflow_journal AS
    SELECT run_id, step_seq AS seq, step, attempt, worker, output, at AS committed_at FROM workflow_events WHERE step_seq IS NOT NULL;

-- An event is only ever written by the statement that changes its run, so nothing has to check that the run exists. When
-- runs go, also by cascade, their events go with them.
ALTER TABLE workflow_events DROP CONSTRAINT workflow_events_run_id_fkey;
CREATE FUNCTION workflow_events_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM workflow_events e USING gone WHERE e.run_id = gone.id;
    RETURN NULL;
END $$;
CREATE TRIGGER workflow_events_follow AFTER DELETE ON workflow_runs
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION workflow_events_follow();

-- Lists are ordered by id, which grows with time. Most runs have no start key.
DROP INDEX workflow_runs_created;
DROP INDEX workflow_runs_start_key;
CREATE UNIQUE INDEX workflow_runs_start_key ON workflow_runs (workflow, start_key) WHERE start_key IS NOT NULL;
-- Room for the next versions of a row on its own page: a step that goes on under its lease changes no indexed column.
ALTER TABLE workflow_runs SET (fillfactor = 60);

-- What the outcome of an attempt means for its run: the kind of the event that tells of it.
CREATE FUNCTION workflow_becomes(kind text, is_last boolean, step text, cancel_asked boolean) RETURNS text
    LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN kind = 'done' OR (kind = 'next' AND is_last) THEN CASE WHEN step = 'cancel' THEN 'cancelled' ELSE 'succeeded' END
        WHEN kind = 'fail' THEN 'failed'
        WHEN cancel_asked AND step <> 'cancel' THEN 'cancelling'
        WHEN kind = 'next' THEN 'step_committed'
        WHEN kind = 'wait' THEN 'waiting'
        WHEN kind = 'retry' THEN 'retry_scheduled'
        ELSE 'released' END
$$;

-- Puts the hint that a run is ready into the queue of its workflow, as a task of apalis. A worker that sleeps holds a
-- shared advisory lock on the name of its queue; only then is there a notification, because transactions that notify
-- commit one after another.
CREATE FUNCTION workflow_hint(run_id uuid, queue text, event_seq integer, ready_at timestamptz, priority integer) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority)
    VALUES (run_id || ':' || event_seq, queue, uuid_send(run_id), 'Pending', 0, 1, ready_at, priority);
    IF pg_try_advisory_lock(hashtext('borealis.idle'), hashtext(queue)) THEN
        PERFORM pg_advisory_unlock(hashtext('borealis.idle'), hashtext(queue));
    ELSE
        PERFORM pg_notify('borealis_ready', queue);
    END IF;
END $$;
