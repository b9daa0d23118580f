//! What the agent says of itself and its machine: milestones of its start, heartbeats, inventory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use borealis_protocol::rest::{
    Details, Heartbeat, IngestResponse, Milestone, PATH_DETAILS, PATH_HEARTBEAT, PATH_STATUS, PHASE_STOPPED, Role, RoleHealth,
    StatusReport,
};
use borealis_protocol::{CONTEXT_SYSTEM, agent_id};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::account::{Account, TokenError};
use crate::backoff::{Backoff, Ending, up_to};
use crate::client::Client;
use crate::clock::local_now;
use crate::inventory::Inventory;
use crate::scripts::Shared;

const SERVICE_MODE: &str = "system";
/// Milestones close together go out as one report.
const SETTLE: Duration = Duration::from_millis(300);

/// How long a stopping agent tries to tell the engine.
const GOOD_BYE: Duration = Duration::from_secs(3);

/// Steps of the start this agent has, in order.
const MILESTONES: [(&str, &str); 11] = [
    ("process_start", "Process started"),
    ("server_config_loaded", "Settings loaded"),
    ("identity_loaded", "Identity loaded"),
    ("authenticating", "Authenticating"),
    ("authenticated", "Authenticated"),
    ("roles_loading", "Roles loading"),
    ("roles_ready", "Roles ready"),
    ("status_channel_online", "Status channel online"),
    ("socket_connecting", "Socket connecting"),
    ("socket_connected", "Socket connected"),
    ("steady_state_online", "Online"),
];

/// The agent's start as a list of milestones.
#[derive(Debug)]
pub(crate) struct Status {
    boot_id: String,
    hostname: String,
    inner: Mutex<Timeline>,
    changed: Notify,
}

#[derive(Debug)]
struct Timeline {
    milestones: Vec<Milestone>,
    phase: String,
    status: &'static str,
    message: String,
    last_error: Option<String>,
}

impl Status {
    pub(crate) fn new(hostname: &str) -> Self {
        let milestones = MILESTONES
            .iter()
            .map(|(key, label)| Milestone {
                key: (*key).to_owned(),
                label: (*label).to_owned(),
                state: "pending".to_owned(),
                ..Milestone::default()
            })
            .collect();
        Self {
            boot_id: uuid::Uuid::new_v4().to_string(),
            hostname: hostname.to_owned(),
            inner: Mutex::new(Timeline {
                milestones,
                phase: String::new(),
                status: "recovering",
                message: String::new(),
                last_error: None,
            }),
            changed: Notify::new(),
        }
    }

    /// A step has begun.
    pub(crate) fn active(&self, key: &str) {
        self.mark(key, "active");
    }

    /// A step is done.
    pub(crate) fn complete(&self, key: &str) {
        self.mark(key, "complete");
    }

    fn mark(&self, key: &str, state: &str) {
        let now = local_now();
        {
            let mut timeline = self.timeline();
            let Some(milestone) = timeline.milestones.iter_mut().find(|milestone| milestone.key == key) else { return };
            if milestone.state == state {
                return;
            }
            state.clone_into(&mut milestone.state);
            milestone.started_at = milestone.started_at.or(Some(now));
            milestone.updated_at = Some(now);
            milestone.completed_at = (state == "complete").then_some(now);
            let label = milestone.label.clone();
            key.clone_into(&mut timeline.phase);
            timeline.message = label;
            timeline.status = "recovering";
            if key == "steady_state_online" {
                timeline.status = "healthy";
                timeline.last_error = None;
            }
        }
        self.changed.notify_one();
    }

    /// The socket was lost.
    pub(crate) fn disconnected(&self, why: &str) {
        {
            let mut timeline = self.timeline();
            let now = local_now();
            for milestone in &mut timeline.milestones {
                if matches!(milestone.key.as_str(), "socket_connecting" | "socket_connected" | "steady_state_online") {
                    "pending".clone_into(&mut milestone.state);
                    milestone.updated_at = Some(now);
                    milestone.completed_at = None;
                }
            }
            "socket_disconnected".clone_into(&mut timeline.phase);
            timeline.status = "degraded";
            "Socket disconnected".clone_into(&mut timeline.message);
            timeline.last_error = Some(why.to_owned());
        }
        self.changed.notify_one();
    }

    fn report(&self) -> StatusReport {
        let timeline = self.timeline();
        StatusReport {
            hostname: self.hostname.clone(),
            service_mode: SERVICE_MODE.to_owned(),
            boot_id: self.boot_id.clone(),
            phase: timeline.phase.clone(),
            status: timeline.status.to_owned(),
            message: timeline.message.clone(),
            milestones: timeline.milestones.clone(),
            last_error: timeline.last_error.clone(),
        }
    }

    fn timeline(&self) -> MutexGuard<'_, Timeline> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends the reports.
pub(crate) struct Reporter {
    pub(crate) client: Client,
    pub(crate) account: Arc<Account>,
    pub(crate) status: Arc<Status>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) inventory: Arc<Inventory>,
    pub(crate) heartbeat_every: Duration,
    pub(crate) details_every: Duration,
}

impl Reporter {
    /// Sends the timeline whenever it changed.
    pub(crate) async fn send_status(&self, stop: CancellationToken) {
        let mut trouble = Backoff::new(Duration::from_secs(5), Duration::from_secs(60));
        let mut first = true;
        loop {
            if !std::mem::take(&mut first) {
                tokio::select! {
                    () = self.status.changed.notified() => {}
                    () = stop.cancelled() => return,
                }
            }
            tokio::time::sleep(SETTLE).await;
            while let Err(wait) = self.send(PATH_STATUS, &self.status.report(), &mut trouble).await {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = stop.cancelled() => return,
                }
            }
            self.status.complete("status_channel_online");
        }
    }

    /// Sends heartbeats until `stop`.
    pub(crate) async fn send_heartbeats(&self, stop: CancellationToken) {
        let mut trouble = Backoff::new(Duration::from_secs(5), Duration::from_secs(60));
        loop {
            let inventory = Arc::clone(&self.inventory);
            let measured = tokio::task::spawn_blocking(move || inventory.metrics()).await.ok();
            let heartbeat = Heartbeat {
                hostname: Some(self.shared.hostname.clone()),
                service_mode: Some(SERVICE_MODE.to_owned()),
                metrics: measured,
                inventory: None,
                internal_ip: self.inventory.internal_ip(),
                device_type: None,
                agent_build_id: Some(env!("CARGO_PKG_VERSION").to_owned()),
                agent_role_health: Some(self.role_health()),
            };
            let usual = self.heartbeat_every + Duration::from_millis(up_to(millis(self.heartbeat_every) / 4));
            let session = self.shared.link.borrow().clone();
            let pause = match self.send(PATH_HEARTBEAT, &heartbeat, &mut trouble).await {
                Ok(answer) => {
                    if let (Some(session), Some(false)) = (session, answer.socket_connected) {
                        session.unknown_to_engine();
                    }
                    usual
                }
                Err(wait) => wait.min(usual.max(Duration::from_secs(60))),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Sends the inventory at start and from time to time.
    pub(crate) async fn send_details(&self, stop: CancellationToken) {
        let mut trouble = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
        loop {
            let inventory = Arc::clone(&self.inventory);
            let details = tokio::task::spawn_blocking(move || inventory.details()).await.unwrap_or_default();
            let body = Details {
                hostname: self.shared.hostname.clone(),
                agent_id: agent_id(&self.shared.hostname, &self.account.guid(), CONTEXT_SYSTEM),
                agent_build_id: Some(env!("CARGO_PKG_VERSION").to_owned()),
                service_mode: Some(SERVICE_MODE.to_owned()),
                agent_role_health: Some(self.role_health()),
                details,
            };
            let usual = self.details_every + Duration::from_millis(up_to(millis(self.details_every) / 10));
            let pause = self.send(PATH_DETAILS, &body, &mut trouble).await.err().unwrap_or(usual);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Tells the engine that the agent stops, so that the device does not look as if it were there. Tried once.
    pub(crate) async fn say_good_bye(&self) {
        let report = StatusReport {
            phase: PHASE_STOPPED.to_owned(),
            status: "unknown".to_owned(),
            message: "Agent stopped".to_owned(),
            ..self.status.report()
        };
        let said = tokio::time::timeout(GOOD_BYE, async {
            let bearer = self.account.bearer().await.ok()?;
            self.client.post::<_, Value>(PATH_STATUS, Some(&bearer), &report).await.ok()
        });
        if !matches!(said.await, Ok(Some(_))) {
            debug!("the engine was not told that the agent stops");
        }
    }

    /// Sends one report, or says when to try again.
    async fn send<T: Serialize + Sync>(&self, path: &str, body: &T, trouble: &mut Backoff) -> Result<IngestResponse, Duration> {
        let (reason, hint) = match self.account.bearer().await {
            Ok(bearer) => match self.client.post::<T, Value>(path, Some(&bearer), body).await {
                Ok(answer) => {
                    let answer: IngestResponse = serde_json::from_value(answer).unwrap_or_default();
                    debug!(path, status = %answer.status, coalesced = answer.coalesced, "reported");
                    // Also when there is nothing to run for a long time: the next key may pass its place on meanwhile.
                    let _ = self.account.engine_key(&answer.signing_key, &answer.signing_key_successions);
                    trouble.reset();
                    return Ok(answer);
                }
                Err(error) => {
                    if matches!(error, crate::client::CallError::Status { status: 401 | 403, .. }) {
                        self.account.distrust_access_token();
                    }
                    (error.to_string(), error.retry_after())
                }
            },
            Err(TokenError::Transient { reason, ending: Ending::Later(hint) }) => (reason, Some(hint)),
            Err(TokenError::Transient { reason, .. }) => (reason, None),
            Err(TokenError::NotEnrolled) => ("not enrolled".to_owned(), None),
        };
        let wait = trouble.wait(hint);
        warn!(path, %reason, retry_ms = wait.as_millis(), "cannot report");
        Err(wait)
    }

    fn role_health(&self) -> RoleHealth {
        let now = local_now();
        let role = |name: &str, label: &str, code: &str, detail: String| Role {
            role_id: format!("system:{name}"),
            role_name: name.to_owned(),
            role_label: label.to_owned(),
            context: "system".to_owned(),
            status_code: code.to_owned(),
            status: code.to_owned(),
            detail,
            details: std::collections::BTreeMap::new(),
            last_checked_at: now,
        };
        let mut scripts = if self.shared.platform.interpreter("bash").is_some() {
            role("context_system", "Scripts", "healthy", "Ready to run scripts".to_owned())
        } else {
            role("context_system", "Scripts", "unsupported", "No script interpreter on this machine".to_owned())
        };
        if self.shared.account.engine_key("", &[]).is_none() {
            "unhealthy".clone_into(&mut scripts.status_code);
            "unhealthy".clone_into(&mut scripts.status);
            "No engine key to check scripts with".clone_into(&mut scripts.detail);
        }
        scripts.details.insert("jobs_underway".to_owned(), self.shared.store.underway().to_string());
        scripts.details.insert("results_unsent".to_owned(), self.shared.store.unacknowledged().len().to_string());
        if let Some(job_id) = self.shared.running() {
            scripts.details.insert("running_job_id".to_owned(), job_id.to_string());
        }
        let auditor = role("device_auditor", "Inventory", "healthy", "Inventory is collected".to_owned());
        let processes = role("process_management", "Processes", "healthy", "Ready to list processes".to_owned());
        RoleHealth { roles: vec![scripts, auditor, processes], reported_at: now, supervisor_revision: 1 }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeline_tells_the_last_step() {
        let status = Status::new("HOST");
        status.complete("process_start");
        status.active("socket_connecting");
        status.mark("no such step", "complete");
        let report = status.report();
        assert_eq!((report.phase.as_str(), report.status.as_str()), ("socket_connecting", "recovering"));
        assert_eq!(report.milestones.first().map(|m| (m.state.as_str(), m.completed_at.is_some())), Some(("complete", true)));
        status.complete("steady_state_online");
        assert_eq!(status.report().status, "healthy");
        status.disconnected("cut");
        let report = status.report();
        assert_eq!((report.phase.as_str(), report.status.as_str()), ("socket_disconnected", "degraded"));
        assert_eq!(report.last_error.as_deref(), Some("cut"));
        assert!(report.milestones.iter().any(|m| m.key == "steady_state_online" && m.state == "pending"));
    }
}
