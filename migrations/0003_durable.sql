-- The durable runtime: runs, their journal, events and signals. apalis keeps its own tables in schema apalis;
-- a task there is a hint that a run is ready, the row here is the truth.

CREATE TABLE workflow_runs (
    id              uuid PRIMARY KEY,
    workflow        text NOT NULL,
    version         integer NOT NULL CHECK (version >= 1),
    -- What makes a start single: unique per workflow.
    start_key       text,
    state           text NOT NULL DEFAULT 'pending'
                    CHECK (state IN ('pending', 'running', 'waiting', 'cancelling', 'succeeded', 'failed', 'cancelled')),
    step            text NOT NULL,
    -- The number of the step about to run, counted over the whole run; it grows by one with every committed step.
    seq             integer NOT NULL DEFAULT 0,
    -- Tries of the present step, and how many of them ended with the death of their worker.
    attempt         integer NOT NULL DEFAULT 0,
    worker_deaths   integer NOT NULL DEFAULT 0,
    -- The last event number given out.
    event_seq       integer NOT NULL DEFAULT 0,
    lease_token     uuid,
    lease_expires_at timestamptz,
    worker          text,
    -- When the present step may be claimed; set by retries and by the end of a wait.
    ready_at        timestamptz NOT NULL DEFAULT now(),
    -- True while the run sleeps; then the signal looked for, whether the last child wakes it, and the instant at which
    -- the wait ends without either.
    parked          boolean NOT NULL DEFAULT false,
    wait_signal     text,
    wait_children   boolean NOT NULL DEFAULT false,
    wait_until      timestamptz,
    -- Why the present step was woken from a wait: {"by": "signal" | "deadline" | "children", "payload": ...}.
    wake            jsonb,
    open_children   integer NOT NULL DEFAULT 0,
    input           jsonb NOT NULL,
    state_data      jsonb NOT NULL DEFAULT 'null',
    output          jsonb,
    error           text,
    parent_id       uuid REFERENCES workflow_runs (id) ON DELETE CASCADE,
    -- Keys whose number of running steps is bounded, each with its limit in workflow_limits.
    limit_keys      text[] NOT NULL DEFAULT '{}',
    priority        integer NOT NULL DEFAULT 0,
    scheduled_job_id bigint,
    site_ids        bigint[] NOT NULL DEFAULT '{}',
    cancel_requested_at timestamptz,
    cancel_reason   text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    started_at      timestamptz,
    finished_at     timestamptz,
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
);
CREATE UNIQUE INDEX workflow_runs_start_key ON workflow_runs (workflow, start_key);
CREATE INDEX workflow_runs_leases ON workflow_runs (lease_expires_at) WHERE lease_token IS NOT NULL;
CREATE INDEX workflow_runs_waits ON workflow_runs (wait_until) WHERE parked AND wait_until IS NOT NULL;
CREATE INDEX workflow_runs_ready ON workflow_runs (ready_at) WHERE state IN ('pending', 'cancelling') AND lease_token IS NULL AND NOT parked;
CREATE INDEX workflow_runs_parent ON workflow_runs (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX workflow_runs_job ON workflow_runs (scheduled_job_id, created_at DESC) WHERE scheduled_job_id IS NOT NULL;
CREATE INDEX workflow_runs_created ON workflow_runs (created_at DESC, id DESC);
CREATE INDEX workflow_runs_finished ON workflow_runs (finished_at) WHERE finished_at IS NOT NULL;

-- The journal: one row per committed step.
CREATE TABLE workflow_journal (
    run_id      uuid NOT NULL REFERENCES workflow_runs (id) ON DELETE CASCADE,
    seq         integer NOT NULL,
    step        text NOT NULL,
    attempt     integer NOT NULL,
    worker      text NOT NULL,
    output      jsonb NOT NULL,
    committed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, seq)
);

-- Evidence: every transition, in order, append-only.
CREATE TABLE workflow_events (
    run_id  uuid NOT NULL REFERENCES workflow_runs (id) ON DELETE CASCADE,
    seq     integer NOT NULL,
    at      timestamptz NOT NULL DEFAULT now(),
    kind    text NOT NULL,
    step    text NOT NULL DEFAULT '',
    attempt integer NOT NULL DEFAULT 0,
    worker  text NOT NULL DEFAULT '',
    detail  jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (run_id, seq)
);

-- Signals, kept until the run they are for has consumed them or is purged.
CREATE TABLE workflow_signals (
    run_id  uuid NOT NULL REFERENCES workflow_runs (id) ON DELETE CASCADE,
    name    text NOT NULL,
    payload jsonb NOT NULL DEFAULT 'null',
    sent_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, name)
);

-- Bounds of the keys in workflow_runs.limit_keys; a key without a row is unbounded.
CREATE TABLE workflow_limits (
    key   text PRIMARY KEY,
    bound integer NOT NULL CHECK (bound >= 1)
);

-- One leader per named duty (the scheduler, recovery); a holder renews before expires_at.
CREATE TABLE duty_leases (
    duty       text PRIMARY KEY,
    holder     text NOT NULL,
    token      uuid NOT NULL,
    expires_at timestamptz NOT NULL
);

-- Worker processes, for operators to see.
CREATE TABLE workers (
    id           uuid PRIMARY KEY,
    name         text NOT NULL,
    host         text NOT NULL DEFAULT '',
    pid          integer NOT NULL DEFAULT 0,
    started_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz
);
