-- What measurements asked for.

-- The search for lost hints walks over what is ready in this order, a piece at a time.
DROP INDEX workflow_runs_ready;
CREATE INDEX workflow_runs_ready ON workflow_runs (ready_at, id) WHERE state IN ('pending', 'cancelling') AND lease_token IS NULL AND NOT parked;

-- A run belongs to the job of its occurrence: one check for each new run where there were two, and a stronger one.
ALTER TABLE job_occurrences ADD CONSTRAINT job_occurrences_job_key UNIQUE (id, job_id);
ALTER TABLE scheduled_job_runs
    DROP CONSTRAINT scheduled_job_runs_job_id_fkey,
    DROP CONSTRAINT scheduled_job_runs_occurrence_id_fkey,
    ADD CONSTRAINT scheduled_job_runs_occurrence_fkey FOREIGN KEY (occurrence_id, job_id)
        REFERENCES job_occurrences (id, job_id) ON DELETE CASCADE;

-- The runs of a job are listed by when they began; a job for all devices has hundreds of thousands.
DROP INDEX scheduled_job_runs_job;
CREATE INDEX scheduled_job_runs_job ON scheduled_job_runs (job_id, coalesce(started_at, scheduled_at) DESC, id DESC);
