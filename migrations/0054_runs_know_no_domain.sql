-- The runtime keeps these two for the program around it, and does not know what they mean. The engine writes the scheduled job and the
-- sites into them.
ALTER TABLE workflow_runs RENAME COLUMN scheduled_job_id TO owner_id;
ALTER TABLE workflow_runs RENAME COLUMN site_ids TO scope_ids;
ALTER INDEX workflow_runs_job RENAME TO workflow_runs_owner;
