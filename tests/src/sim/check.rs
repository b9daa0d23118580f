//! What must be true: of every row at any moment, and of every run once things are quiet.

use borealis_engine::db::Pool;
use sqlx::AssertSqlSafe;

use super::plan::ATTEMPTS;

/// Rows that must not exist, at any moment between two transactions: a name, and a query for their ids as text.
const NEVER: [(&str, &str); 24] = [
    ("an ended run is leased or sleeps", "SELECT id::text FROM workflow_runs WHERE finished_at IS NOT NULL AND (lease_token IS NOT NULL OR parked)"),
    ("a lease without worker, end or running state",
     "SELECT id::text FROM workflow_runs WHERE lease_token IS NOT NULL AND (state NOT IN ('running', 'cancelling') OR worker IS NULL
        OR lease_expires_at IS NULL OR lease_expires_at > now() + interval '10 seconds')"),
    ("running without a lease", "SELECT id::text FROM workflow_runs WHERE state = 'running' AND lease_token IS NULL"),
    ("waiting and not asleep, or asleep and not waiting",
     "SELECT id::text FROM workflow_runs WHERE (state = 'waiting' AND NOT parked) OR (parked AND state NOT IN ('waiting', 'cancelling'))"),
    ("asleep with nothing to wake it",
     "SELECT id::text FROM workflow_runs WHERE parked AND wait_signal IS NULL AND NOT wait_children AND wait_until IS NULL"),
    ("waits for children that have all ended", "SELECT id::text FROM workflow_runs WHERE parked AND wait_children AND open_children = 0"),
    ("waits for any child and was not told of one that has ended",
     "SELECT id::text FROM workflow_runs WHERE parked AND wait_children AND wait_any AND ended_children > told_children"),
    ("waits for a signal that is there",
     "SELECT r.id::text FROM workflow_runs r JOIN workflow_signals s ON s.run_id = r.id AND s.name = r.wait_signal WHERE r.parked"),
    ("open_children is not the number of open children",
     "SELECT p.id::text FROM workflow_runs p WHERE p.open_children <>
        (SELECT count(*) FROM workflow_runs c WHERE c.parent_id = p.id AND c.finished_at IS NULL)"),
    ("the journal has a gap or is not as long as the run",
     "SELECT r.id::text FROM workflow_runs r LEFT JOIN workflow_journal j ON j.run_id = r.id
      GROUP BY r.id HAVING count(j.seq) <> r.seq OR coalesce(max(j.seq) + 1, 0) <> r.seq OR coalesce(min(j.seq), 0) <> 0"),
    ("the events have a gap or are not as many as the run says",
     "SELECT r.id::text FROM workflow_runs r LEFT JOIN workflow_events e ON e.run_id = r.id
      GROUP BY r.id HAVING count(e.seq) <> r.event_seq OR coalesce(max(e.seq), 0) <> r.event_seq OR min(e.seq) <> 1"),
    ("events that go back in time",
     "SELECT e.run_id::text FROM workflow_events e JOIN workflow_events f ON f.run_id = e.run_id AND f.seq = e.seq + 1 WHERE f.at < e.at - interval '20 seconds'"),
    ("a bound is exceeded",
     "SELECT l.key FROM workflow_limits l WHERE l.bound < (SELECT count(*) FROM workflow_runs r WHERE r.lease_token IS NOT NULL AND l.key = ANY (r.limit_keys))"),
    ("too many workers died in one step", "SELECT id::text FROM workflow_runs WHERE worker_deaths > 3 OR (worker_deaths = 3 AND state <> 'failed')"),
    ("failed without a reason, or a reason without failure",
     "SELECT id::text FROM workflow_runs WHERE (state = 'failed' AND coalesce(error, '') = '') OR (state IN ('pending', 'running', 'waiting', 'succeeded') AND error IS NOT NULL)"),
    ("cancelled or cancelling without having been asked",
     "SELECT id::text FROM workflow_runs WHERE (state IN ('cancelled', 'cancelling') OR step = 'cancel') AND cancel_requested_at IS NULL"),
    ("a run that was to be cancelled went on",
     "SELECT e.run_id::text FROM workflow_events e JOIN workflow_events f ON f.run_id = e.run_id AND f.seq > e.seq
      WHERE e.kind = 'cancel_requested' AND f.step <> 'cancel' AND f.kind IN ('step_committed', 'waiting', 'woken', 'retry_scheduled')"),
    ("an effect applied twice", "SELECT run_id::text FROM public.sim_effects WHERE written <> 1"),
    ("an effect without its commit",
     "SELECT f.run_id::text FROM public.sim_effects f LEFT JOIN workflow_journal j USING (run_id, seq) WHERE j.output ->> 'with' IS DISTINCT FROM 'effect'"),
    ("a commit without its effect",
     "SELECT j.run_id::text FROM workflow_journal j LEFT JOIN public.sim_effects f USING (run_id, seq) WHERE j.output ->> 'with' = 'effect' AND f.run_id IS NULL"),
    ("a committed step of another number",
     "SELECT j.run_id::text FROM workflow_journal j WHERE j.output ? 'after' AND (j.output ->> 'after')::int <> j.seq"),
    ("an occurrence whose workflow run has another occurrence or none",
     "SELECT o.id::text FROM job_occurrences o LEFT JOIN workflow_runs r ON r.id = o.workflow_run_id AND r.start_key = o.id::text
      WHERE (o.workflow_run_id IS NOT NULL AND r.id IS NULL) OR (o.state = 'open' AND o.workflow_run_id IS NULL)"),
    ("two occurrences of a job that does not allow it are open",
     "SELECT j.id::text FROM scheduled_jobs j JOIN job_occurrences o ON o.job_id = j.id AND o.state = 'open'
      WHERE j.overlap_policy <> 'allow' GROUP BY j.id HAVING count(*) > 1"),
    ("an instant of the real clock",
     "SELECT run_id::text FROM workflow_events WHERE at < '2040-01-01' UNION ALL SELECT id::text FROM workflow_runs WHERE created_at < '2040-01-01' OR updated_at < '2040-01-01'
      UNION ALL SELECT id FROM apalis.jobs WHERE run_at < '2040-01-01'"),
];

/// While no hint was lost: a run that is ready has one.
const HINTED: (&str, &str) = (
    "a run is ready and has no hint",
    "SELECT r.id::text FROM workflow_runs r WHERE r.state IN ('pending', 'cancelling') AND r.lease_token IS NULL AND NOT r.parked
       AND NOT EXISTS (SELECT FROM apalis.jobs j WHERE j.job_type = r.workflow || '.v' || r.version AND encode(j.job, 'hex')::uuid = r.id)",
);

/// While no hint was doubled: nothing is ready before its time. A cancel leaves an older hint beside its own.
const IN_TIME: (&str, &str) = (
    "a step was tried again before its time",
    "SELECT e.run_id::text FROM workflow_events e JOIN workflow_events f ON f.run_id = e.run_id AND f.seq = e.seq + 1
     WHERE e.kind = 'retry_scheduled' AND f.kind = 'step_started' AND f.step <> 'cancel'
       AND f.at < e.at + (e.detail ->> 'delay_ms')::int * interval '1 millisecond'",
);

/// Rows that must not exist once everything has ended.
const AT_THE_END: [(&str, &str); 4] = [
    (
        "a run that has not ended",
        "SELECT id::text || ' ' || workflow || ' ' || state || ' at ' || step FROM workflow_runs WHERE finished_at IS NULL",
    ),
    ("a hint that means nothing", "SELECT id || ' of ' || encode(job, 'hex')::uuid FROM apalis.jobs"),
    ("an occurrence that was never closed", "SELECT id::text || ' ' || state FROM job_occurrences WHERE state <> 'closed'"),
    ("a leader of nothing", "SELECT duty FROM duty_leases WHERE expires_at > now() + interval '5 seconds'"),
];

fn union(rules: &[(&str, &str)]) -> String {
    let parts: Vec<String> =
        rules.iter().map(|(name, sql)| format!("SELECT $r${name}$r$ AS rule, t.id FROM ({sql}) AS t(id)")).collect();
    parts.join("\nUNION ALL\n")
}

async fn broken(pool: &Pool, sql: String) -> Vec<String> {
    let rows: Vec<(String, String)> =
        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(pool).await.expect("the rules can be asked for");
    rows.into_iter().map(|(rule, id)| format!("{rule}: {id}")).collect()
}

/// What is wrong between two transactions.
pub async fn now(pool: &Pool, hints_were_lost: bool, hints_were_doubled: bool) -> Vec<String> {
    // Each death of a worker but the last, which ends the run, costs one try more than the step's own.
    let attempts = format!(
        "SELECT id::text FROM workflow_runs WHERE attempt > 2 + CASE WHEN workflow IN ('sim', 'sim_child') AND step <> 'cancel' THEN {ATTEMPTS} ELSE 5 END"
    );
    let mut rules = NEVER.to_vec();
    rules.push(("a step was tried too often", attempts.as_str()));
    if !hints_were_lost {
        rules.push(HINTED);
    }
    if !hints_were_doubled {
        rules.push(IN_TIME);
    }
    broken(pool, union(&rules)).await
}

/// What is wrong once everything should have ended.
pub async fn at_the_end(pool: &Pool) -> Vec<String> {
    broken(pool, union(&AT_THE_END)).await
}
