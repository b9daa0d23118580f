-- Jobs name what they run by the id of an assembly, never by a path. Paths of assemblies are unique, and stay reserved while a
-- job names what had them. A job reaches what its owner and its last editor may reach. A quick run stores its script once.

-- The path an assembly would have were it alone: `source_path`, else a folder and the display name with `_` for ASCII characters
-- that are no letter, digit, dot, hyphen or underscore.
CREATE FUNCTION assembly_base_path(assembly_type text, display_name text, source_path text) RETURNS text IMMUTABLE LANGUAGE sql AS $$
    SELECT coalesce(nullif(source_path, ''),
        CASE assembly_type WHEN 'workflow' THEN 'Workflows' WHEN 'ansible' THEN 'Ansible_Playbooks' ELSE 'Scripts' END || '/'
        || translate(display_name, E' !"#$%&''()*+,/:;<=>?@[\\]^`{|}~\n', repeat('_', 31)))
$$;

-- How paths are compared.
CREATE FUNCTION assembly_path_key(path text) RETURNS text IMMUTABLE LANGUAGE sql AS $$
    SELECT lower(ltrim(replace(path, '\', '/'), '/'))
$$;

ALTER TABLE assemblies
    -- What clients show and send; no two assemblies have the same.
    ADD COLUMN path text,
    -- The path as it is compared.
    ADD COLUMN path_key text,
    -- The base path as it is compared: a request by path that fits the base paths of several assemblies is refused.
    ADD COLUMN base_key text;
UPDATE assemblies a SET path = p.path, path_key = assembly_path_key(p.path), base_key = assembly_path_key(p.base)
FROM (
    SELECT guid, base, CASE WHEN row_number() OVER (PARTITION BY assembly_path_key(base) ORDER BY created_at, guid) = 1 THEN base
                            ELSE base || '~' || guid END AS path
    FROM (SELECT guid, created_at, assembly_base_path(assembly_type, display_name, source_path) AS base FROM assemblies) b
) p
WHERE p.guid = a.guid;
ALTER TABLE assemblies
    ALTER COLUMN path SET NOT NULL, ALTER COLUMN path_key SET NOT NULL, ALTER COLUMN base_key SET NOT NULL,
    ADD CONSTRAINT assemblies_path_key UNIQUE (path_key);
-- The engine writes paths itself; an assembly that comes without gets the next best here.
CREATE FUNCTION assembly_path_default() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.path IS NULL THEN
        NEW.path := assembly_base_path(NEW.assembly_type, NEW.display_name, NEW.source_path);
        NEW.base_key := assembly_path_key(NEW.path);
        IF EXISTS (SELECT FROM assemblies WHERE path_key = NEW.base_key) THEN
            NEW.path := NEW.path || '~' || NEW.guid;
        END IF;
        NEW.path_key := assembly_path_key(NEW.path);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER assemblies_path_default BEFORE INSERT ON assemblies FOR EACH ROW EXECUTE FUNCTION assembly_path_default();
CREATE INDEX assemblies_base ON assemblies (base_key);
CREATE INDEX assemblies_owner ON assemblies (owner_user_id);

-- Assemblies that were removed while jobs named them. Their paths are given to no other assembly while one of these jobs still does.
CREATE TABLE assembly_reservations (
    guid       text PRIMARY KEY,
    path_key   text NOT NULL,
    base_key   text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX assembly_reservations_path ON assembly_reservations (path_key);
CREATE INDEX assembly_reservations_base ON assembly_reservations (base_key);

-- Components that name a path get the id of the one script that the path meant until now. Where none or several fit, the path
-- stays as a note: such a job fails until somebody names an assembly. Where an id was given, the path beside it means nothing.
CREATE TEMPORARY TABLE named AS
SELECT c.job_id, c.job_name, c.at, c.component, c.path,
       CASE WHEN c.given IS NOT NULL THEN c.given WHEN cardinality(f.guids) = 1 THEN f.guids[1] END AS guid,
       c.given IS NOT NULL AS by_id, f.guids
FROM (
    SELECT j.id AS job_id, j.name AS job_name, e.ordinality AS at, e.value AS component, e.value ->> 'path' AS path,
           nullif(e.value ->> 'assembly_guid', '') AS given,
           lower(ltrim(replace(btrim(e.value ->> 'path'), '\', '/'), '/')) AS key
    FROM scheduled_jobs j
    CROSS JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(j.components) WHEN 'array' THEN j.components ELSE '[]' END)
        WITH ORDINALITY AS e (value, ordinality)
) c
CROSS JOIN LATERAL (
    -- As paths were looked up until now.
    SELECT coalesce(array_agg(a.guid ORDER BY a.guid), '{}') AS guids FROM assemblies a
    WHERE a.assembly_type = 'script' AND lower(replace(
        coalesce(nullif(a.source_path, ''), 'Scripts/' || regexp_replace(a.display_name, '[^A-Za-z0-9._-]', '_', 'g')), '\', '/'))
        = CASE WHEN c.key LIKE 'scripts/%' THEN c.key ELSE 'scripts/' || c.key END
) f;

UPDATE scheduled_jobs j SET components = n.components
FROM (
    SELECT job_id, jsonb_agg(CASE WHEN guid IS NULL THEN component
                                  ELSE component - 'path' || jsonb_build_object('assembly_guid', guid) END ORDER BY at) AS components
    FROM named GROUP BY job_id
) n
WHERE n.job_id = j.id AND n.components <> j.components;

-- For administrators: which job was bound to which assembly, and which could not be.
WITH event AS (
    INSERT INTO audit_events (actor_kind, action, object_kind, object_id, outcome, detail)
    SELECT 'system', CASE WHEN n.guid IS NULL THEN 'scheduled_job.assembly_unresolved' ELSE 'scheduled_job.assembly_resolved' END,
           'scheduled_job', n.job_id::text, CASE WHEN n.guid IS NULL THEN 'failure' ELSE 'success' END,
           jsonb_build_object('name', n.job_name, 'component', n.at - 1, 'path', n.path, 'assembly_guid', n.guid,
                              'candidates', to_jsonb(n.guids[1:50]))
    FROM named n WHERE NOT n.by_id ORDER BY n.job_id, n.at
    RETURNING id
)
INSERT INTO audit_unsealed SELECT id FROM event;
DROP TABLE named;

-- Which jobs name an assembly.
CREATE INDEX scheduled_jobs_components ON scheduled_jobs USING gin (components jsonb_path_ops);
CREATE INDEX scheduled_jobs_owner ON scheduled_jobs (owner_user_id);
-- The few from before this that name a path which could not be resolved.
CREATE INDEX scheduled_jobs_unresolved ON scheduled_jobs (id) WHERE components @? '$[*] ? (!exists(@.assembly_guid))';

-- Who last changed what a job runs: its components, their variables, its context. Null: the user is gone.
ALTER TABLE scheduled_jobs ADD COLUMN editor_user_id bigint REFERENCES users (id) ON DELETE SET NULL;
UPDATE scheduled_jobs SET editor_user_id = owner_user_id;
-- Who that was is not known of jobs from before; the last to have saved one, where the user is still there, stands for it.
UPDATE scheduled_jobs j SET editor_user_id = u.id
FROM (
    SELECT DISTINCT ON (object_id) object_id, actor_id FROM audit_events
    WHERE object_kind = 'scheduled_job' AND action = 'scheduled_job.update' AND outcome = 'success' AND actor_kind = 'operator'
    ORDER BY object_id, id DESC
) e
JOIN users u ON u.id::text = e.actor_id
WHERE e.object_id = j.id::text;

-- What the devices of a quick run are sent, once for all of them.
CREATE TABLE quick_run_scripts (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    request    jsonb NOT NULL,
    -- The length of the request as text.
    bytes      integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE activity_history ADD COLUMN quick_run_script_id bigint REFERENCES quick_run_scripts (id);
CREATE INDEX activity_history_quick_run ON activity_history (quick_run_script_id) WHERE quick_run_script_id IS NOT NULL;
