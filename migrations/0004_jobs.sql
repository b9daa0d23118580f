-- What to run (assemblies), when and where to run it (scheduled jobs), and what happened (runs, activity).

CREATE TABLE assemblies (
    guid          text PRIMARY KEY CHECK (guid <> '' AND guid = lower(guid)),
    domain        text NOT NULL CHECK (domain IN ('official', 'community', 'user')),
    display_name  text NOT NULL,
    summary       text NOT NULL DEFAULT '',
    -- What the document says of itself; shown before the summary.
    description   text NOT NULL DEFAULT '',
    assembly_type text NOT NULL CHECK (assembly_type IN ('script', 'workflow', 'ansible')),
    assembly_subtype text NOT NULL DEFAULT '',
    payload       text NOT NULL,
    content_hash  text NOT NULL,
    source_repo   text,
    source_path   text,
    source_version text,
    owner_user_id bigint REFERENCES users (id) ON DELETE SET NULL,
    last_edited_by text NOT NULL DEFAULT '',
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX assemblies_name ON assemblies (lower(display_name));

CREATE TABLE scheduled_jobs (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name              text NOT NULL CHECK (name <> '' AND length(name) <= 200),
    job_kind          text NOT NULL DEFAULT 'automation' CHECK (job_kind IN ('automation', 'onboarding', 'agent_maintenance')),
    components        jsonb NOT NULL,
    targets           jsonb NOT NULL,
    schedule_type     text NOT NULL CHECK (schedule_type IN ('immediately', 'once', 'every_5_minutes', 'every_10_minutes',
                          'every_15_minutes', 'every_30_minutes', 'every_hour', 'daily', 'weekly', 'monthly', 'yearly', 'cron')),
    -- The anchor the n-th occurrence is counted from.
    start_at          timestamptz,
    -- What the wall showed in the text of start, where a change of clocks skips that time; null otherwise.
    start_wall        timestamp,
    timezone          text NOT NULL DEFAULT 'UTC',
    cron              text,
    end_at            timestamptz,
    max_occurrences   bigint CHECK (max_occurrences >= 1),
    misfire_policy    text NOT NULL DEFAULT 'run_once' CHECK (misfire_policy IN ('skip', 'run_once', 'run_all')),
    overlap_policy    text NOT NULL DEFAULT 'skip' CHECK (overlap_policy IN ('skip', 'queue', 'allow')),
    duration_stop_enabled boolean NOT NULL DEFAULT false,
    expiration        text NOT NULL DEFAULT 'no_expire',
    stop_after        text,
    execution_context text NOT NULL DEFAULT 'system' CHECK (execution_context IN ('system', 'current_user', 'local', 'ssh', 'winrm',
                          'ssh_individual', 'winrm_individual', 'onboarding_local_network')),
    credential_id     bigint,
    use_service_account boolean NOT NULL DEFAULT false,
    enabled           boolean NOT NULL DEFAULT true,
    owner_user_id     bigint REFERENCES users (id) ON DELETE SET NULL,
    -- The sites the job may ever reach; null: all of them (made by an administrator).
    scope_site_ids    bigint[],
    -- The scheduler's cursor. next_due_at is null when nothing more will come.
    next_due_at       timestamptz,
    -- How many occurrences the schedule has used up (fired, skipped or missed); never derived from history.
    occurrences_used  bigint NOT NULL DEFAULT 0,
    last_occurrence_at timestamptz,
    -- Grows with every edit of the schedule, so that a stale cursor is never applied.
    schedule_revision integer NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    CHECK (schedule_type <> 'cron' OR cron IS NOT NULL)
);
CREATE INDEX scheduled_jobs_due ON scheduled_jobs (next_due_at) WHERE enabled AND next_due_at IS NOT NULL;

-- The sites of a job's saved targets now; null when one of them is in no site or is not bound to one (all_devices): then
-- only administrators see the job. A device that is gone counts for the site it was saved with.
CREATE FUNCTION job_site_ids(targets jsonb) RETURNS bigint[] STABLE LANGUAGE sql AS $$
    SELECT CASE WHEN bool_and(t.site_id IS NOT NULL) THEN array_agg(DISTINCT t.site_id) END
    FROM (
        SELECT CASE WHEN d.guid IS NOT NULL THEN d.site_id WHEN e ->> 'kind' = 'device' THEN (e ->> 'site_id')::bigint END AS site_id
        FROM jsonb_array_elements(targets) e
        LEFT JOIN devices d ON e ->> 'kind' = 'device' AND d.guid = (e ->> 'device_guid')::uuid
    ) t
$$;

-- One planned or manual execution of a job. Its targets are frozen in scheduled_job_runs.
CREATE TABLE job_occurrences (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id          bigint NOT NULL REFERENCES scheduled_jobs (id) ON DELETE CASCADE,
    scheduled_at    timestamptz NOT NULL,
    cause           text NOT NULL CHECK (cause IN ('schedule', 'catch_up', 'rerun', 'retry')),
    state           text NOT NULL DEFAULT 'open' CHECK (state IN ('queued', 'open', 'closed')),
    -- For cause = retry: the targets to run again, as device GUIDs; null: resolve the job's targets.
    only_devices    uuid[],
    -- Set once its targets are rows of scheduled_job_runs.
    frozen_at       timestamptz,
    -- The sites the occurrence may reach, taken from the job or from the caller who asked for it; null: all.
    scope_site_ids  bigint[],
    requested_by    text NOT NULL DEFAULT '',
    workflow_run_id uuid,
    created_at      timestamptz NOT NULL DEFAULT now(),
    finished_at     timestamptz,
    CONSTRAINT job_occurrences_instant_key UNIQUE (job_id, scheduled_at)
);
CREATE INDEX job_occurrences_open ON job_occurrences (job_id) WHERE state <> 'closed';

-- One target of one occurrence, with its state machine.
CREATE TABLE scheduled_job_runs (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id           bigint NOT NULL REFERENCES scheduled_jobs (id) ON DELETE CASCADE,
    occurrence_id    bigint NOT NULL REFERENCES job_occurrences (id) ON DELETE CASCADE,
    scheduled_at     timestamptz NOT NULL,
    status           text NOT NULL DEFAULT 'Pending'
                     CHECK (status IN ('Pending', 'Running', 'Success', 'Warning', 'Failed', 'Expired', 'Timed Out', 'Skipped')),
    error            text CHECK (length(error) <= 512),
    skip_reason      text,
    device_guid      uuid,
    target_hostname  text,
    site_id          bigint,
    shared_execution boolean NOT NULL DEFAULT false,
    component_index  integer,
    component_kind   text NOT NULL DEFAULT 'script',
    component_name   text NOT NULL DEFAULT '',
    resolution_status text NOT NULL DEFAULT 'pending' CHECK (resolution_status IN ('pending', 'eligible', 'skipped', 'unresolved')),
    resolution_reason text NOT NULL DEFAULT '',
    workflow_run_id  uuid,
    -- Pending after this instant: Expired.
    expires_at       timestamptz,
    -- Running for longer than this: a cancel goes out, and without an answer the run is Timed Out.
    stop_after_s     integer CHECK (stop_after_s > 0),
    cancel_requested_at timestamptz,
    cancel_reason    text,
    started_at       timestamptz,
    finished_at      timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX scheduled_job_runs_target_key ON scheduled_job_runs
    (occurrence_id, coalesce(device_guid::text, target_hostname, ''), coalesce(component_index, -1));
CREATE INDEX scheduled_job_runs_job ON scheduled_job_runs (job_id, scheduled_at DESC, id DESC);
CREATE INDEX scheduled_job_runs_open ON scheduled_job_runs (occurrence_id) WHERE status IN ('Pending', 'Running');
CREATE INDEX scheduled_job_runs_limited ON scheduled_job_runs (started_at) WHERE status = 'Running' AND stop_after_s IS NOT NULL;
CREATE INDEX scheduled_job_runs_cancelled ON scheduled_job_runs (cancel_requested_at)
    WHERE status IN ('Pending', 'Running') AND cancel_requested_at IS NOT NULL;
CREATE INDEX scheduled_job_runs_device_open ON scheduled_job_runs (device_guid) WHERE status IN ('Pending', 'Running');

-- One script sent (or to be sent) to one device; what the agent calls a job, by its id.
CREATE TABLE activity_history (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device_guid    uuid NOT NULL REFERENCES devices (guid) ON DELETE CASCADE,
    hostname       text NOT NULL,
    site_id        bigint,
    run_id         bigint REFERENCES scheduled_job_runs (id) ON DELETE SET NULL,
    component_index integer NOT NULL DEFAULT 0,
    component_kind text NOT NULL DEFAULT 'script',
    script_name    text NOT NULL DEFAULT '',
    script_path    text NOT NULL DEFAULT '',
    script_type    text NOT NULL DEFAULT '',
    activity_kind  text NOT NULL DEFAULT '',
    queue_lane     text NOT NULL DEFAULT '',
    status         text NOT NULL DEFAULT 'Queued'
                   CHECK (status IN ('Queued', 'Running', 'Success', 'Warning', 'Failed', 'Expired', 'Timed Out', 'Skipped')),
    error          text,
    stdout         text NOT NULL DEFAULT '',
    stderr         text NOT NULL DEFAULT '',
    exit_code      integer,
    -- What is sent, except signature and key: the script as it was when the occurrence was dispatched.
    request        jsonb NOT NULL,
    content_hash   text NOT NULL DEFAULT '',
    timeout_seconds integer NOT NULL DEFAULT 3600 CHECK (timeout_seconds >= 0),
    metadata       jsonb NOT NULL DEFAULT '{}',
    requested_by   text NOT NULL DEFAULT '',
    -- waiting: not to be sent yet; ready: send when the device is there; sent: written to a socket;
    -- accepted: the agent said it has it; done: terminal.
    delivery       text NOT NULL DEFAULT 'ready' CHECK (delivery IN ('waiting', 'ready', 'sent', 'accepted', 'done')),
    delivery_count integer NOT NULL DEFAULT 0,
    sent_at        timestamptz,
    -- Not delivered by then: Expired.
    deliver_until  timestamptz,
    cancel_requested_at timestamptz,
    cancel_sent_at timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now(),
    started_at     timestamptz,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    finished_at    timestamptz
);
CREATE UNIQUE INDEX activity_history_run_component ON activity_history (run_id, component_index) WHERE run_id IS NOT NULL;
CREATE INDEX activity_history_device ON activity_history (device_guid, id DESC);
CREATE INDEX activity_history_deliverable ON activity_history (device_guid) WHERE delivery IN ('ready', 'sent', 'accepted');
CREATE INDEX activity_history_finished ON activity_history (finished_at) WHERE delivery = 'done';
CREATE INDEX activity_history_deadline ON activity_history (deliver_until) WHERE delivery = 'ready' AND deliver_until IS NOT NULL;

-- Reports that came too late or from the wrong state: kept, never applied.
CREATE TABLE activity_events (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    activity_id bigint NOT NULL REFERENCES activity_history (id) ON DELETE CASCADE,
    at          timestamptz NOT NULL DEFAULT now(),
    kind        text NOT NULL,
    detail      jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX activity_events_activity ON activity_events (activity_id, id);
