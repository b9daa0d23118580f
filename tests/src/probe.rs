//! Workflows that exist to be killed: every kind of step, each leaving a trace that can be counted from outside.

use std::time::Duration;

use borealis_workflows::{
    Registry, StepContext, Workflow,
    durable::{
        definition::{Children, Outcome, StepError, StepResult, Wait, Wake, transient, workflow},
        fault,
    },
    start_children,
};
use serde_json::{Value, json};
use sqlx::PgPool;

/// The tables the traces go to.
pub const TABLES: &str = "
    CREATE TABLE probe_rows (key text PRIMARY KEY, written integer NOT NULL DEFAULT 1);
    CREATE TABLE probe_calls (key text PRIMARY KEY, calls integer NOT NULL DEFAULT 1);
    CREATE TABLE probe_attempts (step text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp(), worker text NOT NULL DEFAULT '');";

/// The signal the probe waits for.
pub const GO: &str = "go";
/// How many children the probe has.
pub const CHILDREN: i64 = 3;

/// All of them.
#[must_use]
pub fn registry() -> Registry {
    Registry::new([probe(), child(), fragile(), moody(), sleeper(), napper(), plain(), single()])
}

/// Five steps: one that writes rows, one that calls outside, a fan-out, a wait, an end. Cancel leaves a row.
#[must_use]
pub fn probe() -> Workflow {
    workflow("probe", 1)
        .step("write", |cx| Box::pin(write(cx)))
        .step("call", |cx| Box::pin(call(cx)))
        .step("children", |cx| Box::pin(children(cx)))
        .step("wait", |cx| Box::pin(wait(cx)))
        .step("end", |cx| Box::pin(end(cx)))
        .on_cancel(|cx| Box::pin(undo(cx)))
}

/// One step that writes a row; a child of the probe.
#[must_use]
pub fn child() -> Workflow {
    workflow("probe_child", 1).step("write", |cx| Box::pin(write(cx)))
}

/// A step that must not be repeated, then an end.
#[must_use]
pub fn fragile() -> Workflow {
    workflow("fragile", 1).step("once", |cx| Box::pin(call(cx))).never_retry().step("end", |cx| Box::pin(end(cx)))
}

/// Fails as its input says: `{"transient": n}` times, or finally, or by panic.
#[must_use]
pub fn moody() -> Workflow {
    workflow("moody", 1).step("try", |cx| Box::pin(attempt(cx))).retry(transient(3)).step("end", |cx| Box::pin(end(cx)))
}

/// Runs until it is told to stop.
#[must_use]
pub fn sleeper() -> Workflow {
    workflow("sleeper", 1).step("sleep", |cx| Box::pin(sleep(cx))).on_cancel(|cx| Box::pin(undo(cx)))
}

/// Waits for an instant.
#[must_use]
pub fn napper() -> Workflow {
    workflow("napper", 1).step("nap", |cx| Box::pin(nap(cx))).step("end", |cx| Box::pin(end(cx)))
}

/// Five empty steps.
#[must_use]
pub fn plain() -> Workflow {
    workflow("plain", 1)
        .step("one", |cx| Box::pin(end(cx)))
        .step("two", |cx| Box::pin(end(cx)))
        .step("three", |cx| Box::pin(end(cx)))
        .step("four", |cx| Box::pin(end(cx)))
        .step("five", |cx| Box::pin(end(cx)))
}

/// One step that answers when it began: microseconds since 1970 by the clock of the machine.
#[must_use]
pub fn single() -> Workflow {
    workflow("single", 1).step("stamp", |cx| Box::pin(stamp(cx)))
}

async fn stamp(_: &mut StepContext) -> StepResult {
    Ok(Outcome::Next(json!(chrono::Utc::now().timestamp_micros())))
}

async fn write(cx: &mut StepContext) -> StepResult {
    let (key, step) = (cx.key(), cx.step);
    let name = if cx.input::<Value>()?.get("child").is_some() { "probe_child" } else { "probe" };
    let tx = cx.tx().await?;
    sqlx::query("INSERT INTO probe_rows (key) VALUES ($1) ON CONFLICT (key) DO UPDATE SET written = probe_rows.written + 1")
        .bind(key)
        .execute(&mut **tx)
        .await?;
    fault::point("inside", name, step);
    Ok(Outcome::Next(json!({"written": true})))
}

/// Something outside that is told the same key at every try, and counts the tries.
async fn call(cx: &mut StepContext) -> StepResult {
    let workflow = if cx.step == "once" { "fragile" } else { "probe" };
    sqlx::query("INSERT INTO probe_calls (key) VALUES ($1) ON CONFLICT (key) DO UPDATE SET calls = probe_calls.calls + 1")
        .bind(cx.key())
        .execute(cx.pool())
        .await?;
    fault::point("inside", workflow, cx.step);
    Ok(Outcome::Next(json!({"called": true})))
}

async fn children(cx: &mut StepContext) -> StepResult {
    match cx.wake {
        Wake::Children => Ok(Outcome::Next(json!({"children": CHILDREN}))),
        _ => {
            let run_id = cx.run_id;
            let children: Vec<_> =
                (0..CHILDREN).map(|n| borealis_workflows::Child { key: n.to_string(), input: json!({"child": n}) }).collect();
            let tx = cx.tx().await?;
            start_children(tx, run_id, &child(), &children).await?;
            fault::point("inside", "probe", "children");
            Ok(Outcome::Wait(Wait { signal: None, children: Children::Last, at_most: None, state: Value::Null }))
        }
    }
}

async fn wait(cx: &mut StepContext) -> StepResult {
    fault::point("inside", "probe", "wait");
    match &cx.wake {
        Wake::Signal(payload) => Ok(Outcome::Next(payload.clone())),
        _ => Ok(Outcome::Wait(Wait { signal: Some(GO.into()), children: Children::None, at_most: None, state: Value::Null })),
    }
}

async fn end(cx: &mut StepContext) -> StepResult {
    fault::point("inside", "probe", cx.step);
    Ok(Outcome::Next(cx.state::<Value>()?))
}

async fn undo(cx: &mut StepContext) -> StepResult {
    let key = format!("undo:{}", cx.run_id);
    let tx = cx.tx().await?;
    sqlx::query("INSERT INTO probe_rows (key) VALUES ($1) ON CONFLICT (key) DO UPDATE SET written = probe_rows.written + 1")
        .bind(key)
        .execute(&mut **tx)
        .await?;
    Ok(Outcome::Done(Value::Null))
}

async fn attempt(cx: &mut StepContext) -> StepResult {
    sqlx::query("INSERT INTO probe_attempts (step) VALUES ($1)").bind(cx.run_id.to_string()).execute(cx.pool()).await?;
    let input: Value = cx.input()?;
    if let Some(times) = input.get("transient").and_then(Value::as_i64)
        && i64::from(cx.attempt) <= times
    {
        return Err(StepError::Transient(format!("try {} is not enough", cx.attempt)));
    }
    if input.get("panic").is_some() {
        panic!("as the test wants it");
    }
    if input.get("final").is_some() {
        return Err(StepError::Final("no way".into()));
    }
    if input.get("ends_failed").is_some() {
        let key = cx.key();
        let row = "INSERT INTO probe_rows (key) VALUES ($1) ON CONFLICT (key) DO UPDATE SET written = probe_rows.written + 1 RETURNING written";
        let written: i32 = sqlx::query_scalar(row).bind(key).fetch_one(&mut **cx.tx().await?).await?;
        // Retried, it goes well.
        let failed = Outcome::Failed { error: "bad_luck: The work went wrong.".into(), output: json!({"written": written}) };
        return Ok(if written == 1 { failed } else { Outcome::Next(json!({"written": written})) });
    }
    if input.get("unstorable").is_some() {
        return Ok(Outcome::Next(json!("a NUL \u{0} that Postgres does not take")));
    }
    Ok(Outcome::Next(Value::Null))
}

async fn sleep(cx: &mut StepContext) -> StepResult {
    let stop = cx.cancelled();
    tokio::select! {
        () = stop.cancelled() => Err(StepError::Stopped),
        () = tokio::time::sleep(Duration::from_secs(120)) => Ok(Outcome::Next(Value::Null)),
    }
}

async fn nap(cx: &mut StepContext) -> StepResult {
    match cx.wake {
        Wake::Deadline => Ok(Outcome::Next(Value::Null)),
        _ => {
            let ms = cx.input::<Value>()?.get("ms").and_then(Value::as_i64).unwrap_or(500);
            let at_most = Some(Duration::from_millis(u64::try_from(ms).unwrap_or(0)));
            Ok(Outcome::Wait(Wait { signal: None, children: Children::None, at_most, state: Value::Null }))
        }
    }
}

/// An engine without agents.
#[derive(Debug)]
pub struct NoAgents;

#[async_trait::async_trait]
impl borealis_workflows::Agents for NoAgents {
    async fn deliver(&self, _: &[uuid::Uuid]) -> borealis_engine::Result<()> {
        Ok(())
    }
}

/// Creates the tables of the traces.
///
/// # Panics
/// When they exist.
pub async fn create_tables(pool: &PgPool) {
    sqlx::raw_sql(TABLES).execute(pool).await.expect("the probe's tables");
}
