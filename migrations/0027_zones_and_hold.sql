-- Time zone rules change. The wall-clock time that a due instant stands for is kept, so that the instant can follow the rules;
-- null where no single wall-clock time decides it, and for cursors of before.
ALTER TABLE scheduled_jobs ADD COLUMN next_due_wall timestamp;
COMMENT ON COLUMN scheduled_jobs.start_wall IS
    'The wall-clock time the start stands for: it was written without an offset, or the schedule type goes by the wall clock.';

-- How far the engine has come, and whether it is held. Every API process keeps the epoch in its state folder too; where this table is
-- behind what a folder says, the database was restored. One row.
CREATE TABLE engine_epoch (
    single            boolean PRIMARY KEY DEFAULT true CHECK (single),
    -- The same in a restored database: a folder that knows another engine says nothing about this one.
    engine_id         uuid NOT NULL DEFAULT gen_random_uuid(),
    -- Grows by one with each start of an API process and each minute; a release goes to the next multiple of 2^32, which is more than
    -- any folder can have seen before it.
    epoch             bigint NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    moved_at          timestamptz NOT NULL DEFAULT now(),
    -- The database this engine runs on, as Postgres knows it; null before the first API process. A dump that is restored elsewhere says
    -- where it came from.
    system_identifier bigint,
    database_oid      oid,
    -- Set while the engine is held: nothing is scheduled and nothing is dispatched.
    held_since        timestamptz,
    held_reason       text CHECK (held_reason IN ('asked', 'older_database', 'other_database')),
    held_by           text NOT NULL DEFAULT '',
    -- The highest epoch a folder had when the engine was held; a release goes beyond it.
    seen_epoch        bigint NOT NULL DEFAULT 0,
    CHECK ((held_since IS NULL) = (held_reason IS NULL)),
    CHECK ((system_identifier IS NULL) = (database_oid IS NULL))
) WITH (fillfactor = 50);
INSERT INTO engine_epoch DEFAULT VALUES;

-- Whether the engine may decide and dispatch, for a process that has seen the epoch `at_least`. Asked in the statements that do.
CREATE FUNCTION engine_may_act(at_least bigint) RETURNS boolean STABLE LANGUAGE sql AS $$
    SELECT e.held_since IS NULL AND e.epoch >= at_least
           AND (e.system_identifier IS NULL
                OR (e.system_identifier = (SELECT c.system_identifier FROM pg_control_system() c)
                    AND e.database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())))
    FROM engine_epoch e
$$;
