-- Indexes for lists and retention on large tables. What a list is ordered by, its index is ordered by too.

-- Lists of runs go by id.
DROP INDEX workflow_runs_job;
CREATE INDEX workflow_runs_job ON workflow_runs (scheduled_job_id, id DESC) WHERE scheduled_job_id IS NOT NULL;
-- The few that operators look for among the many that went well.
CREATE INDEX workflow_runs_unhappy ON workflow_runs (state, id DESC) WHERE state IN ('failed', 'cancelled');

-- Retention.
CREATE INDEX job_occurrences_finished ON job_occurrences (finished_at) WHERE state = 'closed';
