-- Pages of a job's runs are in the order of the instants they were due, which never change; those at which they started do.
DROP INDEX scheduled_job_runs_job;
CREATE INDEX scheduled_job_runs_job ON scheduled_job_runs (job_id, scheduled_at DESC, id DESC);
