//! Takes jobs over, runs them one after the other and reports them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use borealis_protocol::envelope::{self, Refusal};
use borealis_protocol::events::{
    Ack, DECLINED_DISK_ERROR, DECLINED_DISK_FULL, DECLINED_QUEUE_FULL, PROGRESS_CAP_BYTES, QUICK_JOB_ACCEPTED,
    QUICK_JOB_DECLINED, QUICK_JOB_PROGRESS, QUICK_JOB_RESULT, QuickJobAccepted, QuickJobCancel, QuickJobDeclined,
    QuickJobProgress, QuickJobResult, QuickJobRun, REASON_AGENT_ERROR, REASON_AGENT_STOPPED, REASON_CANCELLED,
    REASON_OUTCOME_UNKNOWN, REASON_REFUSED, REASON_TIMED_OUT, STATUS_FAILED, STATUS_RUNNING, STATUS_SUCCESS, STATUS_TIMED_OUT,
};
use serde_json::{Map, Value, json};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::process::{self, End, Live, Script, Stop};
use super::store::{Known, Offer, Store, failure};
use crate::account::Account;
use crate::backoff::Backoff;
use crate::clock::{ServerClock, local_now};
use crate::platform::Platform;
use crate::socket::Session;

/// Time between two pieces of live output.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How long the engine may take to acknowledge.
const ACK_LIMIT: Duration = Duration::from_secs(30);
/// How long the disk may not take that a script begins, before the job ends without having been run. The engine calls a device
/// silent a minute after the script's limit.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a stopping agent tries to get rid of results; what is left goes out at the next start.
const FAREWELL: Duration = Duration::from_secs(5);

const NOT_KNOWN: &str =
    "this machine accepted the job before and does not know it any more (its agent's state is older, or a copy); outcome unknown";
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// What the parts that handle scripts share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) account: Arc<Account>,
    pub(crate) clock: Arc<ServerClock>,
    pub(crate) hostname: String,
    /// Private directory of script files.
    pub(crate) run_dir: PathBuf,
    /// The registered socket, while there is one.
    pub(crate) link: watch::Receiver<Option<Arc<Session>>>,
    /// A job was taken over.
    work: Notify,
    /// A result is there to be sent.
    results: Notify,
    current: Mutex<Option<Current>>,
    /// Jobs taken over before this start; their time may have passed meanwhile.
    recovered: Mutex<BTreeMap<i64, ()>>,
}

struct Current {
    job_id: i64,
    stop: watch::Sender<Option<Stop>>,
}

/// The tasks around [`Shared`].
pub(crate) struct Runner;

impl Shared {
    pub(crate) fn new(
        store: Store,
        platform: Arc<dyn Platform>,
        account: Arc<Account>,
        clock: Arc<ServerClock>,
        hostname: String,
        run_dir: PathBuf,
        link: watch::Receiver<Option<Arc<Session>>>,
    ) -> Self {
        let recovered = store.waiting().into_iter().map(|id| (id, ())).collect();
        Self {
            store,
            platform,
            account,
            clock,
            hostname,
            run_dir,
            link,
            work: Notify::new(),
            results: Notify::new(),
            current: Mutex::new(None),
            recovered: Mutex::new(recovered),
        }
    }

    /// The id of the job that runs now.
    pub(crate) fn running(&self) -> Option<i64> {
        self.current().as_ref().map(|current| current.job_id)
    }

    /// Takes a job over, or says why not; answers what it did.
    pub(crate) async fn take(self: &Arc<Self>, run: QuickJobRun, session: &Session) -> Value {
        let job_id = run.job_id;
        let refusal = self.refusal(&run, true).map(|why| {
            warn!(job_id, why, "refused a job");
            failure(job_id, Some(run.context.clone()), &why, REASON_REFUSED)
        });
        // A job that is known is answered as what it is, whatever stands here.
        let ended = refusal
            .or_else(|| run.accepted.then(|| failure(job_id, Some(run.context.clone()), NOT_KNOWN, REASON_OUTCOME_UNKNOWN)));
        let declined = match self.on_disk(move |store| store.offer(&run, ended, local_now())).await {
            Ok(Offer::Ended) => {
                self.results.notify_one();
                return json!({"status": "refused", "job_id": job_id});
            }
            Ok(Offer::Taken) => {
                info!(job_id, "took a job over");
                self.work.notify_one();
                session.emit_for_ack(QUICK_JOB_ACCEPTED, &QuickJobAccepted { job_id }).await;
                return json!({"status": "accepted", "job_id": job_id});
            }
            Ok(Offer::Known(Known::Underway)) => {
                session.emit_for_ack(QUICK_JOB_ACCEPTED, &QuickJobAccepted { job_id }).await;
                return json!({"status": "accepted", "job_id": job_id});
            }
            Ok(Offer::Known(Known::Ended(result))) => {
                session.emit_for_ack(QUICK_JOB_RESULT, &*result).await;
                return json!({"status": "finished", "job_id": job_id});
            }
            Ok(Offer::Full) => {
                warn!(job_id, "no room for another job");
                DECLINED_QUEUE_FULL
            }
            Err(error) => {
                error!(%error, job_id, "cannot store a job");
                match error.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DECLINED_DISK_FULL,
                    _ => DECLINED_DISK_ERROR,
                }
            }
        };
        decline(job_id, declined, session).await
    }

    /// Why this job must not be run, if so; with `timely`, also because it comes too late. The signed GUID says which machine is meant;
    /// a hostname is a label, and may have changed since the job was made.
    fn refusal(&self, run: &QuickJobRun, timely: bool) -> Option<String> {
        if !matches!(run.run_mode.trim().to_ascii_lowercase().as_str(), "" | "system") {
            return Some(format!("run mode {} is not supported on this system", run.run_mode.trim()));
        }
        if self.platform.interpreter(&run.script_type).is_none() {
            return Some(format!("script type {} is not supported on this system", run.script_type));
        }
        let Some(key) = self.account.engine_key(&run.signing_key, &run.signing_key_successions) else {
            return Some("the agent has no engine key to check the script's signature with".to_owned());
        };
        // Its time is judged below, by more than one clock.
        let checked = envelope::verify(run, &key, &self.account.guid(), i64::MIN);
        let late = timely && run.envelope.as_ref().is_some_and(|envelope| self.clock.is_past(envelope.not_after));
        checked.err().or(late.then_some(Refusal::Expired)).map(|why| why.to_string())
    }

    /// Stops a job, or sees to it that it does not begin; answers what it did.
    pub(crate) async fn cancel(self: &Arc<Self>, cancel: QuickJobCancel) -> Value {
        let job_id = cancel.job_id;
        info!(job_id, reason = %cancel.reason, "asked to cancel a job");
        if self.stop_running(job_id, &cancel.reason) {
            return json!({"status": "cancelling", "job_id": job_id});
        }
        let note = cancel_note(&cancel.reason);
        let now = local_now();
        let settled = self
            .on_disk(move |store| {
                if store.knows(job_id) {
                    if store.is_waiting(job_id) {
                        let result = failure(job_id, store.context(job_id), &note, REASON_CANCELLED);
                        store.finish(&result, now);
                    }
                } else {
                    // The job itself may still be on its way; it must find itself ended.
                    let run = QuickJobRun { job_id, ..QuickJobRun::default() };
                    store.offer(&run, Some(failure(job_id, None, &note, REASON_CANCELLED)), now)?;
                }
                Ok(())
            })
            .await;
        // It may have started while we looked.
        if self.stop_running(job_id, &cancel.reason) {
            return json!({"status": "cancelling", "job_id": job_id});
        }
        self.results.notify_one();
        match settled {
            Ok(()) => json!({"status": "ok", "job_id": job_id}),
            Err(error) => {
                error!(%error, job_id, "cannot store a cancellation");
                json!({"error": "store_failed"})
            }
        }
    }

    fn stop_running(&self, job_id: i64, reason: &str) -> bool {
        match self.current().as_ref() {
            Some(current) if current.job_id == job_id => {
                current.stop.send_replace(Some(Stop::Cancelled(reason.to_owned())));
                true
            }
            _ => false,
        }
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.link.borrow().clone()
    }

    async fn on_disk<T, F>(self: &Arc<Self>, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Store) -> io::Result<T> + Send + 'static,
    {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(io::Error::other)?
    }
}

/// Says that a job was not taken over. The engine offers it again later.
pub(crate) async fn decline(job_id: i64, reason: &str, session: &Session) -> Value {
    session.emit_for_ack(QUICK_JOB_DECLINED, &QuickJobDeclined { job_id, reason: reason.to_owned() }).await;
    json!({"error": reason})
}

impl Runner {
    /// Runs waiting jobs, one at a time, until `stop`; a script that runs then is stopped and reported.
    pub(crate) async fn run_jobs(shared: Arc<Shared>, stop: CancellationToken) {
        let mut trouble = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        while !stop.is_cancelled() {
            match shared.on_disk(Store::next_waiting).await {
                Ok(Some(run)) => {
                    trouble.reset();
                    run_one(&shared, run, &stop).await;
                }
                Ok(None) => {
                    tokio::select! {
                        () = shared.work.notified() => {}
                        () = stop.cancelled() => {}
                    }
                }
                Err(error) => {
                    error!(%error, "cannot read the next job");
                    pause(trouble.wait(None), &stop).await;
                }
            }
        }
    }

    /// Sends results until the engine has acknowledged them, until `stop` and a little longer.
    pub(crate) async fn send_results(shared: Arc<Shared>, stop: CancellationToken) {
        let mut link = shared.link.clone();
        let mut refused = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
        while !stop.is_cancelled() {
            let session = link.borrow_and_update().clone();
            let again = match session {
                Some(session) => send_all(&shared, &session).await,
                None => Sent::All,
            };
            let pause = match again {
                Sent::All => {
                    refused.reset();
                    None
                }
                Sent::Later(hint) => Some(refused.wait(hint)),
            };
            tokio::select! {
                () = shared.results.notified() => {}
                changed = link.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // What failed on another connection says nothing of this one.
                    refused.reset();
                }
                () = async { match pause { Some(pause) => tokio::time::sleep(pause).await, None => std::future::pending().await } } => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// A last try before the agent ends.
    pub(crate) async fn farewell(shared: &Arc<Shared>) {
        if let Err(error) = shared.on_disk(Store::save).await {
            error!(%error, "the disk does not take the end of a job");
        }
        if let Some(session) = shared.session() {
            let _ = tokio::time::timeout(FAREWELL, send_all(shared, &session)).await;
        }
    }
}

enum Sent {
    All,
    /// Something is left; the engine may have said how long to wait.
    Later(Option<Duration>),
}

async fn send_all(shared: &Arc<Shared>, session: &Session) -> Sent {
    let mut left = Sent::All;
    if let Err(error) = shared.on_disk(Store::save).await {
        warn!(%error, "the disk does not take the end of a job yet");
        left = Sent::Later(None);
    }
    for job_id in shared.store.unacknowledged() {
        let result = match shared.on_disk(move |store| store.result(job_id)).await {
            Ok(Some(result)) => result,
            Ok(None) => continue,
            Err(error) => {
                error!(%error, job_id, "cannot read a result");
                left = Sent::Later(None);
                continue;
            }
        };
        let answer = session.call(QUICK_JOB_RESULT, &result, ACK_LIMIT).await;
        let ack: Option<Ack> = answer
            .ok()
            .and_then(|mut args| (!args.is_empty()).then(|| args.swap_remove(0)))
            .and_then(|value| serde_json::from_value(value).ok());
        match ack {
            Some(ack) if ack.settles() => {
                if let Err(error) = shared.on_disk(move |store| store.acknowledge(job_id, local_now())).await {
                    error!(%error, job_id, "cannot note an acknowledgement");
                    left = Sent::Later(None);
                }
            }
            Some(ack) => {
                warn!(job_id, error = ack.error.as_deref().unwrap_or_default(), "the engine did not take a result");
                left = Sent::Later(ack.retry_after_ms.map(Duration::from_millis));
            }
            // No answer: the socket is gone or the engine is busy.
            None => return Sent::Later(None),
        }
    }
    left
}

async fn run_one(shared: &Arc<Shared>, run: QuickJobRun, stop: &CancellationToken) {
    let job_id = run.job_id;
    let (send_stop, receive_stop) = watch::channel(None);
    *shared.current() = Some(Current { job_id, stop: send_stop.clone() });
    let ended = run_current(shared, run, stop, &send_stop, receive_stop).await;
    if let Some(result) = ended {
        let kept = shared
            .on_disk(move |store| {
                store.finish(&result, local_now());
                Ok(())
            })
            .await;
        if let Err(error) = kept {
            error!(%error, job_id, "cannot keep a result");
        }
    }
    *shared.current() = None;
    shared.results.notify_one();
}

/// Runs a waiting job: its result; none when it waits on or has ended otherwise.
async fn run_current(
    shared: &Arc<Shared>,
    run: QuickJobRun,
    stop: &CancellationToken,
    send_stop: &watch::Sender<Option<Stop>>,
    mut receive_stop: watch::Receiver<Option<Stop>>,
) -> Option<QuickJobResult> {
    let job_id = run.job_id;
    let context = run.context.clone();
    let failed = |why: &str, reason| Some(failure(job_id, Some(context.clone()), why, reason));
    // A job that waited in this process came in time. One from before a restart may be long past it.
    let recovered = shared.recovered.lock().unwrap_or_else(PoisonError::into_inner).remove(&job_id).is_some();
    if let Some(why) = shared.refusal(&run, recovered) {
        return failed(&why, REASON_REFUSED);
    }
    let script = match prepare(shared, &run) {
        Ok(script) => script,
        Err(why) => return failed(&why, REASON_AGENT_ERROR),
    };
    let mut trouble = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
    let since = Instant::now();
    loop {
        if stop.is_cancelled() {
            return None;
        }
        if let Some(Stop::Cancelled(why)) = &*receive_stop.borrow_and_update() {
            return failed(&cancel_note(why), REASON_CANCELLED);
        }
        match shared.on_disk(move |store| store.start(job_id, local_now())).await {
            Ok(true) => break,
            Ok(false) => return None,
            // The engine waits for it no longer than for a silent device.
            Err(error) if since.elapsed() > START_LIMIT => {
                return failed(&format!("the disk does not take that the script begins: {error}"), REASON_AGENT_ERROR);
            }
            Err(error) => {
                error!(%error, job_id, "the disk does not take that a script begins");
                tokio::select! {
                    () = pause(trouble.wait(None), stop) => {}
                    _ = receive_stop.changed() => {}
                }
            }
        }
    }
    info!(job_id, name = %run.script_name, "script started");
    let live = Arc::new(Live::default());
    let running = process::run(&shared.platform, script, &live, receive_stop);
    let end = tokio::select! {
        end = running => end,
        never = report_progress(shared, job_id, &context, &live) => match never {},
        never = pass_on(stop, send_stop) => match never {},
    };
    info!(job_id, ?end, "script ended");
    Some(to_result(job_id, context, run.timeout_seconds, &end, &live))
}

fn prepare(shared: &Shared, run: &QuickJobRun) -> Result<Script, String> {
    let mut content =
        borealis_protocol::keys::from_base64(&run.script_content).map_err(|error| format!("the script is {error}"))?;
    // It is no part of a script: bash would take it for the beginning of the first command's name.
    if content.starts_with(BYTE_ORDER_MARK) {
        content.drain(..BYTE_ORDER_MARK.len());
    }
    let interpreter = shared
        .platform
        .interpreter(&run.script_type)
        .ok_or_else(|| format!("script type {} is not supported on this system", run.script_type))?;
    let mut environment = shared.platform.base_environment();
    for (name, value) in script_environment(&run.environment, &run.variables) {
        environment.retain(|(known, _)| known != name.as_str());
        environment.push((OsString::from(name), OsString::from(value)));
    }
    shared.platform.private_dir(&shared.run_dir).map_err(|error| format!("cannot use the script directory: {error}"))?;
    let limit = (run.timeout_seconds > 0).then(|| Duration::from_secs(run.timeout_seconds));
    Ok(Script { job_id: run.job_id, content, interpreter, environment, dir: shared.run_dir.clone(), limit })
}

/// What a script's environment gets from its job: `environment` as it is, and what only
/// `variables` names under its upper-case name and its own.
fn script_environment(environment: &BTreeMap<String, String>, variables: &[Value]) -> BTreeMap<String, String> {
    let mut built = BTreeMap::new();
    for variable in variables {
        let name = ["name", "key"].iter().find_map(|field| variable.get(field)).and_then(Value::as_str).unwrap_or_default();
        let alias: String = name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
        if alias.is_empty() {
            continue;
        }
        let value = ["value", "default", "defaultValue", "default_value"].iter().find_map(|field| variable.get(field));
        let value = match value {
            None | Some(Value::Null) => String::new(),
            Some(Value::Bool(true)) => "True".to_owned(),
            Some(Value::Bool(false)) => "False".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        built.insert(alias.to_ascii_uppercase(), value.clone());
        built.insert(alias, value);
    }
    built.extend(environment.iter().map(|(name, value)| (name.clone(), value.clone())));
    // What no process can be given.
    built.retain(|name, value| !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
    built
}

async fn report_progress(
    shared: &Arc<Shared>,
    job_id: i64,
    context: &Map<String, Value>,
    live: &Live,
) -> std::convert::Infallible {
    let mut announced = false;
    loop {
        // Without a socket the output waits in memory, which is bounded; the result brings all of it anyway.
        if let Some(session) = shared.session() {
            let (stdout, stderr) = (live.stdout().piece(PROGRESS_CAP_BYTES), live.stderr().piece(PROGRESS_CAP_BYTES));
            if !announced || !stdout.is_empty() || !stderr.is_empty() {
                let progress = QuickJobProgress {
                    job_id,
                    status: STATUS_RUNNING.to_owned(),
                    append_output: Some(true),
                    stdout: (!stdout.is_empty()).then_some(stdout),
                    stderr: (!stderr.is_empty()).then_some(stderr),
                    context: Some(context.clone()),
                    ..QuickJobProgress::default()
                };
                // Waiting for the answer keeps a slow engine from being flooded.
                announced |= session.call(QUICK_JOB_PROGRESS, &progress, ACK_LIMIT).await.is_ok();
            }
        }
        tokio::time::sleep(PROGRESS_EVERY).await;
    }
}

async fn pass_on(stop: &CancellationToken, send: &watch::Sender<Option<Stop>>) -> std::convert::Infallible {
    stop.cancelled().await;
    send.send_if_modified(|present| {
        let first = present.is_none();
        if first {
            *present = Some(Stop::AgentStopping);
        }
        first
    });
    std::future::pending().await
}

fn to_result(job_id: i64, context: Map<String, Value>, limit_seconds: u64, end: &End, live: &Live) -> QuickJobResult {
    let (stdout, stdout_cut) = live.stdout().finished();
    let (mut stderr, stderr_cut) = live.stderr().finished();
    let (status, exit_code, reason, note) = match end {
        End::Exited(0) => (STATUS_SUCCESS, Some(0), None, None),
        End::Exited(code) => (STATUS_FAILED, Some(*code), None, None),
        End::TimedOut => {
            let note = format!("the script was stopped after its limit of {limit_seconds} s");
            (STATUS_TIMED_OUT, None, Some(REASON_TIMED_OUT), Some(note))
        }
        End::Stopped(Stop::Cancelled(why)) => (STATUS_FAILED, None, Some(REASON_CANCELLED), Some(cancel_note(why))),
        End::Stopped(Stop::AgentStopping) => {
            let note = "the script was stopped because the agent was stopped".to_owned();
            (STATUS_FAILED, None, Some(REASON_AGENT_STOPPED), Some(note))
        }
        End::NotStarted(why) => (STATUS_FAILED, None, Some(REASON_AGENT_ERROR), Some(why.clone())),
    };
    if let Some(note) = note {
        if !stderr.is_empty() && !stderr.ends_with('\n') {
            stderr.push('\n');
        }
        stderr.push_str(&note);
        stderr.push('\n');
    }
    QuickJobResult {
        job_id,
        status: status.to_owned(),
        stdout,
        stderr,
        context: Some(context),
        exit_code,
        truncated: (stdout_cut || stderr_cut).then_some(true),
        reason: reason.map(str::to_owned),
    }
}

fn cancel_note(reason: &str) -> String {
    let reason: String = reason.trim().chars().take(500).collect();
    if reason.is_empty() { "cancelled".to_owned() } else { format!("cancelled: {reason}") }
}

async fn pause(time: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(time) => {}
        () = stop.cancelled() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_follows_the_contract() {
        let environment = BTreeMap::from([("HOST_NAME".to_owned(), "given".to_owned()), ("A=B".to_owned(), "x".to_owned())]);
        let variables = [
            json!({"name": "host name", "default": "ignored"}),
            json!({"name": "flag", "value": true}),
            json!({"name": "off", "value": false}),
            json!({"key": "count", "default": 3, "value": 4}),
            json!({"name": "nothing", "value": null}),
            json!({"name": "nul", "value": "a\u{0}b"}),
            json!({"value": "nameless"}),
            json!("odd"),
        ];
        let built = script_environment(&environment, &variables);
        let get = |name: &str| built.get(name).map(String::as_str);
        assert_eq!(get("HOST_NAME"), Some("given"), "the environment wins");
        assert_eq!(get("host_name"), Some("ignored"));
        assert_eq!((get("FLAG"), get("flag"), get("OFF")), (Some("True"), Some("True"), Some("False")));
        assert_eq!((get("COUNT"), get("NOTHING")), (Some("4"), Some("")));
        assert_eq!((get("A=B"), get("NUL"), get("")), (None, None, None));
    }

    #[test]
    fn results_say_why() {
        let live = Live::default();
        live.stderr().push(b"half");
        let result = |end| to_result(1, Map::new(), 60, &end, &live);
        assert_eq!(result(End::Exited(0)).status, STATUS_SUCCESS);
        let failed = result(End::Exited(2));
        assert_eq!((failed.status.as_str(), failed.exit_code, failed.reason), (STATUS_FAILED, Some(2), None));
        let late = result(End::TimedOut);
        assert_eq!(late.status, STATUS_TIMED_OUT);
        assert_eq!(late.stderr, "half\nthe script was stopped after its limit of 60 s\n");
        let cancelled = result(End::Stopped(Stop::Cancelled("by ann".into())));
        assert_eq!((cancelled.status.as_str(), cancelled.reason.as_deref()), (STATUS_FAILED, Some(REASON_CANCELLED)));
        assert!(cancelled.stderr.ends_with("cancelled: by ann\n"));
    }
}
