-- What has ended stays as it ended, whoever writes. Only a failed workflow run may be tried again.
CREATE FUNCTION has_ended() RETURNS trigger
    LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% % has ended', TG_TABLE_NAME, OLD.id USING ERRCODE = 'check_violation';
END $$;

CREATE TRIGGER has_ended BEFORE UPDATE ON workflow_runs FOR EACH ROW
    WHEN (OLD.finished_at IS NOT NULL AND NEW.state <> OLD.state AND NOT (OLD.state = 'failed' AND NEW.state IN ('pending', 'cancelling')))
    EXECUTE FUNCTION has_ended();
CREATE TRIGGER has_ended BEFORE UPDATE ON scheduled_job_runs FOR EACH ROW
    WHEN (OLD.status NOT IN ('Pending', 'Running') AND NEW.status <> OLD.status)
    EXECUTE FUNCTION has_ended();
CREATE TRIGGER has_ended BEFORE UPDATE ON activity_history FOR EACH ROW
    WHEN (OLD.status NOT IN ('Queued', 'Running') AND NEW.status <> OLD.status OR OLD.delivery = 'done' AND NEW.delivery <> 'done')
    EXECUTE FUNCTION has_ended();
CREATE TRIGGER has_ended BEFORE UPDATE ON job_occurrences FOR EACH ROW
    WHEN (OLD.state = 'closed' AND NEW.state <> 'closed')
    EXECUTE FUNCTION has_ended();
