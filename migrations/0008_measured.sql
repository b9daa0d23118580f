-- What measurements asked for.

-- The search for lost hints walks over what is ready in this order, a piece at a time.
DROP INDEX workflow_runs_ready;
CREATE INDEX workflow_runs_ready ON workflow_runs (ready_at, id) WHERE state IN ('pending', 'cancelling') AND lease_token IS NULL AND NOT parked;
