//! What is asked of the engine, and what it has accepted.

use std::{collections::BTreeSet, time::Duration};

use borealis_engine::db::Pool;
use borealis_workflows::{CancelAsked, NewRun, Workflow, request_cancel, signal, start};
use rand::{RngExt, rngs::StdRng};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::real::HOSTNAME;
use crate::{Actor, probe};

/// How long one attempt to reach the engine may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the engine has accepted: it has answered, so it has promised.
#[derive(Debug, Default)]
pub struct Accepted {
    /// Runs, with the key each was started with.
    pub runs: Vec<(Uuid, String)>,
    /// Runs whose cancel was accepted.
    pub cancels: BTreeSet<Uuid>,
    /// Jobs that ran at once on every device.
    pub jobs: Vec<i64>,
    /// The job that is due every few seconds.
    pub recurrent: Option<i64>,
}

/// Seconds between two instants of the recurrent job.
pub const PERIOD: i64 = 2;

/// Asks for work until `count` runs are accepted; the jobs are spread over `lasts`. After `stop` waiting runs get their signal.
pub async fn run(
    pool: &Pool,
    admins: Vec<Actor>,
    mut rng: StdRng,
    count: usize,
    lasts: Duration,
    script: &str,
    stop: &CancellationToken,
) -> Accepted {
    let seed = rng.random();
    let (mut accepted, jobs) = tokio::join!(runs(pool, rng, count, lasts, stop), jobs(admins, seed, lasts, script));
    (accepted.jobs, accepted.recurrent) = jobs;
    accepted
}

async fn runs(pool: &Pool, mut rng: StdRng, count: usize, lasts: Duration, stop: &CancellationToken) -> Accepted {
    let mut accepted = Accepted::default();
    let mut waiting: Vec<Uuid> = Vec::new();
    let (began, every) = (tokio::time::Instant::now(), lasts.mul_f64(0.9) / u32::try_from(count.max(1)).unwrap_or(1));
    for n in 0..count {
        // What an outage held up is made up for, so that all of it is asked for among the faults.
        tokio::time::sleep_until(began + every * u32::try_from(n).unwrap_or(u32::MAX)).await;
        let (workflow, input) = pick(&mut rng);
        let key = format!("chaos:{n}");
        let run = until_answered(|| begin(pool, &workflow, &key, &input)).await;
        accepted.runs.push((run, key));
        if workflow.name == "probe" {
            waiting.push(run);
        }
        if rng.random_bool(0.1) {
            let asked = until_answered(|| cancel(pool, run)).await;
            if asked != CancelAsked::Ended {
                accepted.cancels.insert(run);
            }
        }
        if rng.random_bool(0.3) && !waiting.is_empty() {
            let run = waiting.swap_remove(rng.random_range(0..waiting.len()));
            until_answered(|| send(pool, run)).await;
        }
    }
    stop.cancelled().await;
    for run in waiting {
        until_answered(|| send(pool, run)).await;
    }
    accepted
}

fn pick(rng: &mut StdRng) -> (Workflow, Value) {
    match rng.random_range(0..100) {
        0..40 => (probe::plain(), json!({"n": 1})),
        40..70 => (probe::probe(), json!({})),
        70..80 => (probe::napper(), json!({"ms": rng.random_range(100..4_000)})),
        80..90 => (probe::moody(), json!({"transient": rng.random_range(0..3)})),
        90..95 => (probe::fragile(), json!({})),
        _ => (probe::single(), json!({})),
    }
}

async fn begin(pool: &Pool, workflow: &Workflow, key: &str, input: &Value) -> borealis_engine::Result<Uuid> {
    let mut tx = pool.begin().await?;
    let new = NewRun { key: Some(key.to_owned()), input: input.clone(), ..NewRun::default() };
    let started = start(&mut tx, workflow, new).await?;
    tx.commit().await?;
    Ok(started.run_id)
}

async fn cancel(pool: &Pool, run: Uuid) -> borealis_engine::Result<CancelAsked> {
    let mut tx = pool.begin().await?;
    let asked = request_cancel(&mut tx, run, "chaos").await?;
    tx.commit().await?;
    Ok(asked)
}

async fn send(pool: &Pool, run: Uuid) -> borealis_engine::Result<bool> {
    let mut tx = pool.begin().await?;
    let sent = signal(&mut tx, run, probe::GO, &json!({"answer": 42})).await?;
    tx.commit().await?;
    Ok(sent)
}

/// Asks again until there is an answer: what is asked has the same effect however often it is asked.
async fn until_answered<T>(ask: impl AsyncFn() -> borealis_engine::Result<T>) -> T {
    loop {
        match tokio::time::timeout(PATIENCE, ask()).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(error)) => assert!(error.is_transient(), "refused for another reason than trouble: {error:?}"),
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A job for every device every few seconds, over REST at any of the API processes, and one that is due all the time.
async fn jobs(admins: Vec<Actor>, seed: u64, lasts: Duration, script: &str) -> (Vec<i64>, Option<i64>) {
    let script = until_made(
        &admins,
        seed,
        "/api/assemblies",
        "script",
        &json!({
            "domain": "user", "display_name": "chaos", "assembly_type": "script", "assembly_subtype": "bash",
            "payload": {"name": "chaos", "type": "bash", "script": script, "timeout_seconds": 600}
        }),
    )
    .await;
    let job = |schedule: Value, targets: Value| json!({"name": "chaos", "components": [{"assembly_guid": script["assembly_guid"], "name": "chaos"}], "targets": targets, "schedule": schedule});
    let mut often = job(
        json!({"type": "cron", "cron": format!("*/{PERIOD} * * * * *")}),
        json!([{"kind": "device", "hostname": "fleet-0"}, {"kind": "device", "hostname": HOSTNAME}]),
    );
    often["misfire_policy"] = json!("run_all");
    often["overlap_policy"] = json!("allow");
    let recurrent = until_made(&admins, seed, "/api/scheduled_jobs", "recurrent", &often).await["job"]["id"].as_i64();
    let (mut made, began, mut n) = (Vec::new(), tokio::time::Instant::now(), 0);
    while began.elapsed() < lasts.mul_f64(0.9) {
        n += 1;
        let now = job(json!({"type": "immediately"}), json!([{"kind": "all_devices"}]));
        let answer = until_made(&admins, seed, "/api/scheduled_jobs", &format!("job-{n}"), &now).await;
        made.push(answer["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {answer}")));
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    (made, recurrent)
}

/// Posts at one API process after the other, with the same idempotency key, until one says that it is done.
async fn until_made(admins: &[Actor], seed: u64, path: &str, name: &str, body: &Value) -> Value {
    for admin in admins.iter().cycle() {
        let request = admin
            .request(reqwest::Method::POST, path)
            .header("idempotency-key", format!("chaos-{seed}-{name}"))
            .timeout(PATIENCE)
            .json(body);
        match request.send().await {
            Ok(answer) if answer.status().is_success() => {
                if let Ok(answer) = answer.json().await {
                    return answer;
                }
            }
            Ok(answer) => {
                let status = answer.status().as_u16();
                let text = answer.text().await.unwrap_or_default();
                // 409: the twin of this very request is still under way at the other process.
                assert!([409, 503].contains(&status), "{path} answered {status}: {text}");
            }
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    unreachable!("the cycle of API processes has no end")
}
