-- The tables of the runtime, for programs that keep no migrations of their own for them. Runs in a database with the queue's tables or
-- before them; see `setup_alone`.

CREATE TABLE workflow_runs (
    id uuid PRIMARY KEY,
    workflow text NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    start_key text,
    state text NOT NULL DEFAULT 'pending'
        CHECK (state IN ('pending', 'running', 'waiting', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    step text NOT NULL,
    seq integer NOT NULL DEFAULT 0,
    attempt integer NOT NULL DEFAULT 0,
    worker_deaths integer NOT NULL DEFAULT 0,
    event_seq integer NOT NULL DEFAULT 0,
    lease_token uuid,
    lease_expires_at timestamptz,
    worker text,
    ready_at timestamptz NOT NULL DEFAULT now(),
    parked boolean NOT NULL DEFAULT false,
    wait_signal text,
    wait_children boolean NOT NULL DEFAULT false,
    wait_until timestamptz,
    wake jsonb,
    open_children integer NOT NULL DEFAULT 0,
    wait_any boolean NOT NULL DEFAULT false,
    ended_children integer NOT NULL DEFAULT 0,
    told_children integer NOT NULL DEFAULT 0,
    input jsonb NOT NULL,
    state_data jsonb NOT NULL DEFAULT 'null',
    output jsonb,
    error text,
    parent_id uuid REFERENCES workflow_runs (id) ON DELETE CASCADE,
    limit_keys text[] NOT NULL DEFAULT '{}',
    priority integer NOT NULL DEFAULT 0,
    owner_id bigint,
    scope_ids bigint[] NOT NULL DEFAULT '{}',
    place text NOT NULL DEFAULT '',
    cancel_requested_at timestamptz,
    cancel_reason text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT workflow_runs_check CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
) WITH (fillfactor = 60);

CREATE UNIQUE INDEX workflow_runs_start_key ON workflow_runs (workflow, start_key) WHERE start_key IS NOT NULL;
CREATE INDEX workflow_runs_ready ON workflow_runs (ready_at, id)
    WHERE state IN ('pending', 'cancelling') AND lease_token IS NULL AND NOT parked;
CREATE INDEX workflow_runs_leases ON workflow_runs (lease_expires_at) WHERE lease_token IS NOT NULL;
CREATE INDEX workflow_runs_waits ON workflow_runs (wait_until) WHERE parked AND wait_until IS NOT NULL;
CREATE INDEX workflow_runs_parent ON workflow_runs (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX workflow_runs_owner ON workflow_runs (owner_id, id DESC) WHERE owner_id IS NOT NULL;
CREATE INDEX workflow_runs_finished ON workflow_runs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX workflow_runs_unhappy ON workflow_runs (state, id DESC) WHERE state IN ('failed', 'cancelled');

-- What happened to a run, in order; the outputs of its steps are the journal.
CREATE TABLE workflow_events (
    run_id uuid NOT NULL,
    seq integer NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    step text NOT NULL DEFAULT '',
    attempt integer NOT NULL DEFAULT 0,
    worker text NOT NULL DEFAULT '',
    detail jsonb NOT NULL DEFAULT '{}',
    step_seq integer,
    output jsonb,
    PRIMARY KEY (run_id, seq)
);

CREATE VIEW workflow_journal AS
SELECT run_id, step_seq AS seq, step, attempt, worker, output, at AS committed_at FROM workflow_events WHERE step_seq IS NOT NULL;

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

-- Signals that came before their run waited for them.
CREATE TABLE workflow_signals (
    run_id uuid NOT NULL REFERENCES workflow_runs (id) ON DELETE CASCADE,
    name text NOT NULL,
    payload jsonb NOT NULL DEFAULT 'null',
    sent_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, name)
);

-- How many steps may run at once under a key.
CREATE TABLE workflow_limits (
    key text PRIMARY KEY,
    bound integer NOT NULL CHECK (bound >= 1)
);

CREATE FUNCTION workflow_events_follow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM workflow_events e USING gone WHERE e.run_id = gone.id;
    DELETE FROM workflow_output o USING gone WHERE o.run_id = gone.id;
    RETURN NULL;
END $$;
CREATE TRIGGER workflow_events_follow AFTER DELETE ON workflow_runs REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION workflow_events_follow();

-- The queue of a run.
CREATE FUNCTION workflow_queue(workflow text, version integer, place text) RETURNS text IMMUTABLE LANGUAGE sql AS $$
    SELECT workflow || '.v' || version || CASE WHEN place = '' THEN '' ELSE '@' || place END
$$;

-- A run that has ended stays as it ended; only a failed one may be retried.
CREATE FUNCTION has_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% % has ended', TG_TABLE_NAME, OLD.id USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER has_ended BEFORE UPDATE ON workflow_runs FOR EACH ROW
    WHEN (OLD.finished_at IS NOT NULL AND NEW.state <> OLD.state
          AND NOT (OLD.state = 'failed' AND NEW.state IN ('pending', 'cancelling')))
    EXECUTE FUNCTION has_ended();

-- Which runs are ready is told to those who sleep; see `src/wakeup.rs`. Writes the hint of a run and notifies while somebody sleeps.
CREATE FUNCTION workflow_awake(queue text, marked boolean, kept boolean)
 RETURNS boolean
 LANGUAGE plpgsql
AS $$
DECLARE
    name integer := hashtext(queue);
BEGIN
    IF marked THEN
        PERFORM pg_advisory_unlock_shared(hashtext('borealis.sleeper'), name);
    END IF;
    -- To the end of this statement nobody can fall asleep.
    IF NOT kept OR NOT pg_try_advisory_xact_lock(hashtext('borealis.sleeper'), name) THEN
        RETURN kept;
    END IF;
    PERFORM pg_advisory_unlock(hashtext('borealis.keeper'), name);
    PERFORM pg_advisory_unlock(hashtext('borealis.hint'), name);
    RETURN false;
END $$;

CREATE FUNCTION workflow_becomes(kind text, is_last boolean, step text, cancel_asked boolean)
 RETURNS text
 LANGUAGE sql
 IMMUTABLE
AS $$
    SELECT CASE
        WHEN kind = 'done' OR (kind = 'next' AND is_last) THEN CASE WHEN step = 'cancel' THEN 'cancelled' ELSE 'succeeded' END
        WHEN kind = 'fail' THEN 'failed'
        WHEN cancel_asked AND step <> 'cancel' THEN 'cancelling'
        WHEN kind = 'next' THEN 'step_committed'
        WHEN kind = 'wait' THEN 'waiting'
        WHEN kind = 'retry' THEN 'retry_scheduled'
        ELSE 'released' END
$$;

CREATE FUNCTION workflow_hint(run_id uuid, queue text, event_seq integer, ready_at timestamptz, priority integer)
 RETURNS void
 LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority)
    VALUES (run_id || ':' || event_seq, queue, uuid_send(run_id), 'Pending', 0, 1, ready_at, priority);
    IF NOT pg_try_advisory_xact_lock_shared(hashtext('borealis.hint'), hashtext(queue)) THEN
        PERFORM pg_advisory_xact_lock_shared(hashtext('borealis.notifier'), hashtext(queue));
        PERFORM pg_notify('borealis_ready', queue);
    END IF;
END $$;

CREATE FUNCTION workflow_sleep(queue text, marked boolean, kept boolean)
 RETURNS text
 LANGUAGE plpgsql
AS $$
DECLARE
    name integer := hashtext(queue);
BEGIN
    IF NOT marked THEN
        IF NOT pg_try_advisory_lock(hashtext('borealis.notifier'), name) THEN
            RETURN 'busy';
        END IF;
        PERFORM pg_advisory_unlock(hashtext('borealis.notifier'), name);
        PERFORM pg_advisory_lock_shared(hashtext('borealis.sleeper'), name);
    END IF;
    IF kept THEN
        RETURN 'keeps';
    END IF;
    IF pg_try_advisory_lock(hashtext('borealis.hint'), name) THEN
        PERFORM pg_advisory_lock(hashtext('borealis.keeper'), name);
        RETURN 'keeps';
    END IF;
    IF NOT pg_try_advisory_lock_shared(hashtext('borealis.keeper'), name) THEN
        RETURN 'sleeps';
    END IF;
    PERFORM pg_advisory_unlock_shared(hashtext('borealis.keeper'), name);
    PERFORM pg_advisory_unlock_shared(hashtext('borealis.sleeper'), name);
    RETURN 'busy';
END $$;

