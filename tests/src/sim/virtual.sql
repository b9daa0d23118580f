-- Virtual time: functions that shadow the clock for connections whose search_path has this schema before pg_catalog. The
-- instant is a setting of the connection, so that it stands still within a transaction as now() does.
CREATE SCHEMA virtual;
CREATE FUNCTION virtual.now() RETURNS timestamptz STABLE LANGUAGE sql
    AS $$ SELECT pg_catalog.current_setting('virtual.now')::timestamptz $$;
CREATE FUNCTION virtual.transaction_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS $$ SELECT virtual.now() $$;
CREATE FUNCTION virtual.statement_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS $$ SELECT virtual.now() $$;
CREATE FUNCTION virtual.clock_timestamp() RETURNS timestamptz STABLE LANGUAGE sql AS $$ SELECT virtual.now() $$;
CREATE FUNCTION virtual.pg_postmaster_start_time() RETURNS timestamptz STABLE LANGUAGE sql
    AS $$ SELECT pg_catalog.current_setting('virtual.postmaster')::timestamptz $$;
-- Nobody listens here, and the lock notifications are queued under is shared with every other database of the server.
CREATE FUNCTION virtual.pg_notify(text, text) RETURNS void LANGUAGE sql AS $$ SELECT NULL::void $$;

-- Defaults hold the function they were made with.
DO $$
DECLARE d record;
BEGIN
    FOR d IN SELECT a.attrelid::regclass AS tab, a.attname AS col, pg_get_expr(f.adbin, f.adrelid) AS expr
             FROM pg_attrdef f JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
             WHERE pg_get_expr(f.adbin, f.adrelid) ~ '\m(now|clock_timestamp|transaction_timestamp|statement_timestamp)\(\)'
    LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN %I SET DEFAULT %s', d.tab, d.col,
                       regexp_replace(d.expr, '\m(now|clock_timestamp|transaction_timestamp|statement_timestamp)\(\)', 'virtual.\1()', 'g'));
    END LOOP;
    -- Rows stay where they were put: a seed replays in the same order.
    FOR d IN SELECT c.oid::regclass AS tab FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'r' AND n.nspname IN ('public', 'apalis')
    LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = false)', d.tab);
    END LOOP;
END $$;

-- What steps leave behind in their own transaction.
CREATE TABLE sim_effects (
    run_id  uuid NOT NULL,
    seq     integer NOT NULL,
    written integer NOT NULL DEFAULT 1,
    PRIMARY KEY (run_id, seq)
);
