-- No wake-up is lost between the moment a hint is written and the moment it is committed (docs/decisions/0008).
--
-- Four advisory locks for each queue; the second part of their keys is the hash of its name:
--   borealis.hint      shared: a transaction that has written a hint and does not notify, until it ends.
--                      exclusive: the session that keeps it while at least one fetcher of the queue sleeps.
--   borealis.notifier  shared: a transaction that has written a hint and notifies, until it ends.
--   borealis.sleeper   shared: every session whose fetcher sleeps.
--   borealis.keeper    exclusive: the session that keeps borealis.hint, which tells it from transactions.

-- Puts the hint that a run is ready into the queue of its workflow, as a task of apalis. It notifies only when a fetcher
-- sleeps, because transactions that notify commit one after another. Otherwise its transaction is seen by every fetcher
-- that wants to sleep.
CREATE OR REPLACE FUNCTION workflow_hint(run_id uuid, queue text, event_seq integer, ready_at timestamptz, priority integer) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority)
    VALUES (run_id || ':' || event_seq, queue, uuid_send(run_id), 'Pending', 0, 1, ready_at, priority);
    IF NOT pg_try_advisory_xact_lock_shared(hashtext('borealis.hint'), hashtext(queue)) THEN
        PERFORM pg_advisory_xact_lock_shared(hashtext('borealis.notifier'), hashtext(queue));
        PERFORM pg_notify('borealis_ready', queue);
    END IF;
END $$;

-- A fetcher that has found nothing wants to sleep. What its session holds already: the mark of a sleeper, the keeping of
-- borealis.hint. Answers
--   busy    a transaction that has written a hint has not ended: look again in a moment. The mark is not held.
--   sleeps  each transaction that writes a hint from now on notifies, and those that did before have ended. Another session sees to it.
--   keeps   the same, and this session sees to it.
CREATE FUNCTION workflow_sleep(queue text, marked boolean, kept boolean) RETURNS text LANGUAGE plpgsql AS $$
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

-- A fetcher is awake. Its session gives up the mark of a sleeper, and what it keeps unless another fetcher sleeps. Answers
-- whether it still keeps it; then this has to be asked again.
CREATE FUNCTION workflow_awake(queue text, marked boolean, kept boolean) RETURNS boolean LANGUAGE plpgsql AS $$
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
