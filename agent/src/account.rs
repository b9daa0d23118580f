//! Who the agent is to the engine: its key, its GUID, its tokens and the engine key it trusts. One file, private.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use borealis_protocol::keys::{self, NONCE_LEN, SigningKey, VerifyingKey};
use borealis_protocol::rest::{
    EnrollRequest, EnrollResponse, FINAL_REFRESH_ERRORS, PASSING_REFRESH_ERRORS, PATH_ENROLL_POLL, PATH_ENROLL_REQUEST,
    PATH_TOKEN_REFRESH, PollRequest, PollResponse, RefreshRequest, RefreshResponse, RemoteOpsRoute, TokenCapabilities,
};
use borealis_protocol::succession::{self, Succession};
use borealis_protocol::{IDENTITY_CONTESTED, IDENTITY_HELD, normalise_guid};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::Ending;
use crate::client::{CallError, Client};
use crate::clock::local_now;
use crate::platform::{self, Platform};
use crate::{Error, Identity, Result, files};

const SCHEMA_VERSION: u32 = 1;
/// A token with less than this left is refreshed before it is used.
const REFRESH_BEFORE: Duration = Duration::from_secs(60);
/// Lifetime of an access token when the engine names none.
const DEFAULT_LIFETIME_SECONDS: i64 = 900;
/// The longest lifetime believed, so that a wrong number cannot stop refreshing.
const MAX_LIFETIME_SECONDS: i64 = 86_400;

/// How long jobs of a script key that has passed its place on are still run, in seconds.
const FORMER_KEY_S: i64 = 300;

/// When to ask again while another machine has this identity and the engine does not say it; never later than the first.
const HELD_AGAIN: Duration = Duration::from_secs(240);
const CONTESTED_AGAIN: Duration = Duration::from_secs(5);
const HELD: &str = "another machine has the identity of this agent, and an operator has to decide (see the device approvals)";
const CONTESTED: &str = "another agent with this identity is connected, or was a moment ago";
const HELD_STILL: &str = "waiting, as another machine has the identity of this agent";

const CAPABILITIES: TokenCapabilities = TokenCapabilities { rotates: true };

#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    schema_version: u32,
    /// Base64 of the 32 secret bytes of the Ed25519 identity.
    private_key: String,
    #[serde(default)]
    guid: Option<String>,
    #[serde(default)]
    tokens: Option<Tokens>,
    /// Base64 SPKI of the engine's script key, as received at enrollment.
    #[serde(default)]
    server_signing_key: Option<String>,
    /// The script key before the present one.
    #[serde(default)]
    former_signing_key: Option<Former>,
    #[serde(default)]
    remote_ops_route: Option<RemoteOpsRoute>,
}

impl Stored {
    fn read(platform: &dyn Platform, path: &Path) -> Result<Option<Self>> {
        match files::read_json::<Self>(platform, path)? {
            Some(stored) if stored.schema_version != SCHEMA_VERSION => {
                let reason = format!("written by another version of the agent (schema {})", stored.schema_version);
                Err(Error::Corrupt { path: path.to_owned(), reason })
            }
            stored => Ok(stored),
        }
    }

    fn key(&self, path: &Path) -> Result<SigningKey> {
        keys::from_base64(&self.private_key)
            .ok()
            .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok())
            .map(|bytes| SigningKey::from_bytes(&bytes))
            .ok_or_else(|| Error::Corrupt { path: path.to_owned(), reason: "the private key is unreadable".to_owned() })
    }

    fn is_enrolled(&self) -> bool {
        self.tokens.is_some() && self.guid.is_some()
    }
}

/// Reads the identity in `state_dir` and changes nothing; none when no agent ever ran there.
///
/// # Errors
/// A file that is there and cannot be read.
pub fn identity(state_dir: &Path) -> Result<Option<Identity>> {
    let path = account_file(state_dir);
    let Some(stored) = Stored::read(&*platform::current(), &path)? else { return Ok(None) };
    let fingerprint = keys::fingerprint(&stored.key(&path)?.verifying_key());
    let enrolled = stored.is_enrolled();
    Ok(Some(Identity { guid: stored.guid.unwrap_or_default(), fingerprint, enrolled }))
}

fn account_file(state_dir: &Path) -> PathBuf {
    state_dir.join("agent.json")
}

/// A script key that has passed its place on.
#[derive(Clone, Serialize, Deserialize)]
struct Former {
    key: String,
    /// Until when jobs signed with it are run, in epoch seconds of the machine's clock: not every process of the engine changes at once.
    until: i64,
}

#[derive(Clone, Serialize, Deserialize)]
struct Tokens {
    access_token: String,
    /// Epoch seconds of the machine's clock.
    access_expires_at: i64,
    refresh_token: String,
}

struct Inner {
    stored: Stored,
    /// Until when the access token is used, by the monotonic clock.
    usable_until: Instant,
    /// The disk could not take the last change.
    unsaved: bool,
    /// Until when nothing is sent to the engine: another machine has this identity.
    held_until: Option<Instant>,
}

/// The agent's account with the engine.
pub(crate) struct Account {
    platform: Arc<dyn Platform>,
    client: Client,
    path: PathBuf,
    inner: Mutex<Inner>,
    /// One refresh at a time.
    refreshing: tokio::sync::Mutex<()>,
    key: SigningKey,
    /// What is said of this machine.
    machine_id: String,
    /// What tells this run of the agent from others: see [`borealis_protocol::events::ConnectAgent::instance`].
    instance: String,
    /// Cancelled when the engine has ended the account; replaced at the next enrollment.
    lost: Mutex<CancellationToken>,
    /// The engine refused a refresh without ending the account.
    refused: Notify,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    /// The engine ended the account, or there never was one.
    #[error("the agent is not enrolled")]
    NotEnrolled,
    /// Try again later.
    #[error("{reason}")]
    Transient { reason: String, ending: Ending },
}

/// How an attempt to enroll failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnrollError {
    /// An operator said no.
    #[error("the enrollment was denied: {0}")]
    Denied(String),
    /// The engine does not take this request or code; asking again with the same changes nothing soon.
    #[error("the enrollment was refused: {0}")]
    Refused(String),
    /// Try again later.
    #[error("{reason}")]
    Transient { reason: String, retry_after: Option<Duration> },
    /// The agent is to stop.
    #[error("stopped")]
    Stopped,
}

/// What a refused refresh means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// The account is over.
    Wipe,
    /// The engine itself refuses the token, and does not say that the account is over.
    Refused,
    /// Not the engine's word, or no word about the account: try again.
    Keep,
}

/// Reads the reaction from the engine's answer. Only a JSON body whose `error` is exactly a code of the engine counts, with a status
/// that goes with it: pages of proxies and portals may contain any word.
pub(crate) fn reaction_to(status: u16, body: &str) -> Reaction {
    if !matches!(status, 401 | 403 | 404) {
        return Reaction::Keep;
    }
    let code = refusal_code(body);
    if FINAL_REFRESH_ERRORS.contains(&code.as_str()) {
        Reaction::Wipe
    } else if PASSING_REFRESH_ERRORS.contains(&code.as_str()) {
        Reaction::Refused
    } else {
        Reaction::Keep
    }
}

/// The code of a refusal; empty when the body is not one of the engine's.
fn refusal_code(body: &str) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    serde_json::from_str(body).map(|refusal: Refusal| refusal.error).unwrap_or_default()
}

impl Account {
    /// Reads the account from `state_dir`, making a new identity at the first start.
    pub(crate) fn open(platform: Arc<dyn Platform>, client: Client, state_dir: &Path, machine_id: String) -> Result<Self> {
        let path = account_file(state_dir);
        let stored = match Stored::read(&*platform, &path)? {
            Some(stored) => stored,
            None => {
                let key = SigningKey::from_bytes(&rand::random());
                let stored = Stored {
                    schema_version: SCHEMA_VERSION,
                    private_key: keys::to_base64(key.as_bytes()),
                    guid: None,
                    tokens: None,
                    server_signing_key: None,
                    former_signing_key: None,
                    remote_ops_route: None,
                };
                files::replace_json(&*platform, &path, &stored).map_err(Error::file(&path))?;
                stored
            }
        };
        let key = stored.key(&path)?;
        let left = stored.tokens.as_ref().map_or(0, |tokens| tokens.access_expires_at.saturating_sub(local_now()));
        // A clock that was set back must not make an old token look fresh for long.
        let usable_until = Instant::now() + seconds(left.clamp(0, DEFAULT_LIFETIME_SECONDS));
        Ok(Self {
            platform,
            client,
            path,
            inner: Mutex::new(Inner { stored, usable_until, unsaved: false, held_until: None }),
            refreshing: tokio::sync::Mutex::new(()),
            key,
            lost: Mutex::new(CancellationToken::new()),
            refused: Notify::new(),
            machine_id,
            instance: uuid::Uuid::new_v4().to_string(),
        })
    }

    pub(crate) fn is_enrolled(&self) -> bool {
        self.read(Stored::is_enrolled)
    }

    /// The device's GUID, empty before the first enrollment.
    pub(crate) fn guid(&self) -> String {
        self.read(|stored| stored.guid.clone()).unwrap_or_default()
    }

    /// The key that what `announced` has signed is to be checked with: the one pinned at enrollment, or one that it has passed its place
    /// to, which is pinned from then on.
    pub(crate) fn engine_key(&self, announced: &str, successions: &[Succession]) -> Option<VerifyingKey> {
        let read = |text: String| keys::from_spki_base64(&text).ok();
        let pinned = self.read(|stored| stored.server_signing_key.clone()).and_then(read)?;
        let announced = announced.trim();
        if announced.is_empty() || keys::from_spki_base64(announced).is_ok_and(|key| key == pinned) {
            return Some(pinned);
        }
        let former = self.read(|stored| stored.former_signing_key.clone()).filter(|former| former.until > local_now());
        if let Some(former) = former.and_then(|former| read(former.key))
            && keys::from_spki_base64(announced).is_ok_and(|key| key == former)
        {
            return Some(former);
        }
        let Some(next) = succession::follow(&pinned, successions, announced) else { return Some(pinned) };
        info!("the engine's script key has passed its place to another");
        let saved = self.write(None, |stored| {
            stored.server_signing_key = Some(keys::spki_base64(&next));
            let until = local_now().saturating_add(FORMER_KEY_S);
            stored.former_signing_key = Some(Former { key: keys::spki_base64(&pinned), until });
        });
        if let Err(error) = saved {
            warn!(%error, "the engine's new script key is not on disk yet");
        }
        Some(next)
    }

    pub(crate) fn route(&self) -> Option<RemoteOpsRoute> {
        self.read(|stored| stored.remote_ops_route.clone())
    }

    /// What is said of this machine: see [`borealis_protocol::machine_id`].
    pub(crate) fn machine_id(&self) -> &str {
        &self.machine_id
    }

    /// See [`borealis_protocol::events::ConnectAgent::instance`].
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }

    /// Reads a refusal of the engine. When another machine has this identity, nothing is sent until the engine may be asked again, and
    /// then for new tokens first; what to tell people is answered.
    pub(crate) fn hear_refusal(&self, code: &str, again: Option<Duration>) -> Option<&'static str> {
        let (why, again) = match code {
            IDENTITY_HELD => (HELD, again.unwrap_or(HELD_AGAIN)),
            IDENTITY_CONTESTED => (CONTESTED, again.unwrap_or(CONTESTED_AGAIN)),
            _ => return None,
        };
        if let Ok(mut inner) = self.inner.lock() {
            inner.held_until = Some(Instant::now() + again.min(HELD_AGAIN));
            inner.usable_until = Instant::now();
        }
        Some(why)
    }

    pub(crate) fn fingerprint(&self) -> String {
        keys::fingerprint(&self.key.verifying_key())
    }

    /// Cancelled once the engine has ended the account.
    pub(crate) fn lost(&self) -> CancellationToken {
        self.lost.lock().map(|token| token.clone()).unwrap_or_default()
    }

    /// Returns when the engine has refused a refresh without ending the account.
    pub(crate) async fn refresh_refused(&self) {
        self.refused.notified().await;
    }

    /// The next [`Self::bearer`] fetches a new token: the present one was refused.
    pub(crate) fn distrust_access_token(&self) {
        if let Ok(mut inner) = self.inner.lock() {
            inner.usable_until = Instant::now();
        }
    }

    /// An access token with at least a minute left.
    pub(crate) async fn bearer(&self) -> Result<String, TokenError> {
        if let Some(token) = self.fresh_token()? {
            return Ok(token);
        }
        let _one = self.refreshing.lock().await;
        if let Some(token) = self.fresh_token()? {
            return Ok(token);
        }
        self.refresh().await
    }

    fn fresh_token(&self) -> Result<Option<String>, TokenError> {
        let mut inner = self.inner.lock().map_err(|_| TokenError::NotEnrolled)?;
        if let Some(left) = inner.held_until.map(|until| until.saturating_duration_since(Instant::now())) {
            if !left.is_zero() {
                return Err(TokenError::Transient { reason: HELD_STILL.to_owned(), ending: Ending::Later(left) });
            }
            inner.held_until = None;
        }
        if inner.unsaved {
            inner.unsaved = files::replace_json(&*self.platform, &self.path, &inner.stored).is_err();
        }
        let tokens = inner.stored.tokens.as_ref().ok_or(TokenError::NotEnrolled)?;
        let fresh = inner.usable_until.saturating_duration_since(Instant::now()) > REFRESH_BEFORE;
        Ok(fresh.then(|| tokens.access_token.clone()))
    }

    async fn refresh(&self) -> Result<String, TokenError> {
        let request = self
            .read(|stored| {
                Some(RefreshRequest {
                    guid: stored.guid.clone()?,
                    refresh_token: stored.tokens.as_ref()?.refresh_token.clone(),
                    capabilities: CAPABILITIES,
                    machine_id: self.machine_id.clone(),
                    instance: self.instance.clone(),
                })
            })
            .ok_or(TokenError::NotEnrolled)?;
        let answer: RefreshResponse = match self.client.post(PATH_TOKEN_REFRESH, None, &request).await {
            Ok(answer) => answer,
            Err(error) => {
                let reaction = match &error {
                    CallError::Status { status, body, .. } => reaction_to(*status, body),
                    _ => Reaction::Keep,
                };
                match reaction {
                    Reaction::Wipe => {
                        warn!(%error, "the engine has ended this agent's account");
                        self.wipe();
                        return Err(TokenError::NotEnrolled);
                    }
                    Reaction::Refused => self.refused.notify_one(),
                    Reaction::Keep => {}
                }
                let held = match &error {
                    CallError::Status { status: 409, body, retry_after } => self.hear_refusal(&refusal_code(body), *retry_after),
                    _ => None,
                };
                let reason = held.map_or_else(|| error.to_string(), str::to_owned);
                return Err(TokenError::Transient { reason, ending: error.ending() });
            }
        };
        if answer.access_token.is_empty() {
            return Err(TokenError::Transient { reason: "the engine answered no token".to_owned(), ending: Ending::Refused });
        }
        let token = answer.access_token.clone();
        let rotated = answer.refresh_token.filter(|text| !text.is_empty()).unwrap_or(request.refresh_token);
        let lifetime = lifetime(Some(answer.expires_in));
        let stored = self.update(lifetime, |stored| {
            stored.tokens = Some(Tokens {
                access_token: answer.access_token,
                access_expires_at: local_now().saturating_add(lifetime),
                refresh_token: rotated,
            });
            if answer.remote_ops_route.is_some() {
                stored.remote_ops_route = answer.remote_ops_route;
            }
        });
        if let Err(error) = stored {
            // They are in memory, and every later use of a token tries the disk again.
            warn!(%error, "cannot store the refreshed tokens");
        }
        Ok(token)
    }

    /// Asks for admission with `code` and waits for the decision.
    pub(crate) async fn enroll(&self, code: &str, hostname: &str, stop: &CancellationToken) -> Result<(), EnrollError> {
        tokio::select! {
            () = stop.cancelled() => Err(EnrollError::Stopped),
            done = self.enroll_steps(code, hostname) => done,
        }
    }

    async fn enroll_steps(&self, code: &str, hostname: &str) -> Result<(), EnrollError> {
        let client_nonce: [u8; NONCE_LEN] = rand::random();
        let client_nonce_text = keys::to_base64(&client_nonce);
        let request = EnrollRequest {
            hostname: hostname.to_owned(),
            enrollment_code: code.trim().to_owned(),
            agent_pubkey: keys::spki_base64(&self.key.verifying_key()),
            client_nonce: client_nonce_text.clone(),
            onboarding_context: None,
        };
        let answer: EnrollResponse = self.client.post(PATH_ENROLL_REQUEST, None, &request).await.map_err(enroll_error)?;
        if answer.status != "pending" || answer.approval_reference.is_empty() {
            return Err(EnrollError::Refused(format!("unexpected status {}", answer.status)));
        }
        let server_nonce = keys::from_base64(&answer.server_nonce)
            .map_err(|error| EnrollError::Refused(format!("the server nonce is {error}")))?;
        let proof = keys::enrollment_proof_bytes(&server_nonce, &answer.approval_reference, &client_nonce);
        let poll = PollRequest {
            approval_reference: answer.approval_reference.clone(),
            client_nonce: client_nonce_text,
            proof_sig: keys::sign_base64(&self.key, &proof),
            capabilities: CAPABILITIES,
        };
        info!(reference = %answer.approval_reference, fingerprint = %self.fingerprint(), "enrollment requested, waiting for approval");
        let mut pause = poll_pause(answer.poll_after_ms, 1000);
        let mut outages = 0u32;
        loop {
            tokio::time::sleep(pause).await;
            let decision: PollResponse = match self.client.post(PATH_ENROLL_POLL, None, &poll).await {
                Ok(decision) => decision,
                Err(CallError::Status { status: 404, .. }) => {
                    return Err(transient("the engine does not know the request any more"));
                }
                Err(CallError::Status { status, body, .. }) if (400..500).contains(&status) && status != 429 && status != 409 => {
                    return Err(transient(&format!("the poll was answered {status}: {body}")));
                }
                Err(error) => {
                    // The request stays valid while the engine is away.
                    outages = outages.saturating_add(1);
                    let longest = 5u64.saturating_mul(u64::from(outages)).min(60);
                    pause = error.retry_after().unwrap_or(Duration::from_secs(longest)).min(Duration::from_secs(300));
                    warn!(%error, "cannot poll the enrollment");
                    continue;
                }
            };
            outages = 0;
            match decision.status.as_str() {
                "pending" => pause = poll_pause(decision.poll_after_ms, 5000),
                "approved" | "completed" => return self.admit(decision, &answer.signing_key),
                "denied" => return Err(EnrollError::Denied(decision.reason.unwrap_or_default())),
                other => return Err(transient(&format!("the request is {other}"))),
            }
        }
    }

    fn admit(&self, decision: PollResponse, earlier_key: &str) -> Result<(), EnrollError> {
        let filled = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let (Some(guid), Some(access_token), Some(refresh_token)) =
            (filled(decision.guid), filled(decision.access_token), filled(decision.refresh_token))
        else {
            return Err(transient("the tokens were handed out before"));
        };
        let signing_key = filled(decision.signing_key).unwrap_or_else(|| earlier_key.to_owned());
        let signing_key = keys::from_spki_base64(&signing_key)
            .map_err(|error| EnrollError::Refused(format!("the engine's signing key is {error}")))?;
        let lifetime = lifetime(decision.expires_in);
        self.update(lifetime, |stored| {
            stored.guid = Some(normalise_guid(&guid));
            stored.tokens = Some(Tokens { access_token, access_expires_at: local_now().saturating_add(lifetime), refresh_token });
            stored.server_signing_key = Some(keys::spki_base64(&signing_key));
            stored.former_signing_key = None;
            stored.remote_ops_route = decision.remote_ops_route;
        })
        .map_err(|error| transient(&format!("cannot store the tokens: {error}")))?;
        if let Ok(mut lost) = self.lost.lock() {
            *lost = CancellationToken::new();
        }
        Ok(())
    }

    /// Gives up the tokens; the identity stays.
    pub(crate) fn wipe(&self) {
        if let Err(error) = self.update(0, |stored| {
            stored.tokens = None;
            stored.remote_ops_route = None;
        }) {
            warn!(%error, "cannot erase the tokens");
        }
        self.lost().cancel();
    }

    fn read<T>(&self, look: impl FnOnce(&Stored) -> T) -> T
    where
        T: Default,
    {
        self.inner.lock().map(|inner| look(&inner.stored)).unwrap_or_default()
    }

    /// Changes the account in memory, then on disk. The file is replaced as a whole, so a crash leaves the old or the new
    /// refresh token there, never none.
    fn update(&self, lifetime: i64, change: impl FnOnce(&mut Stored)) -> std::io::Result<()> {
        self.write(Some(lifetime), change)
    }

    /// Changes what is stored; with a lifetime, of the tokens in it.
    fn write(&self, lifetime: Option<i64>, change: impl FnOnce(&mut Stored)) -> std::io::Result<()> {
        let mut inner = self.inner.lock().map_err(|_| std::io::Error::other("poisoned"))?;
        change(&mut inner.stored);
        if let Some(lifetime) = lifetime {
            inner.usable_until = Instant::now() + seconds(lifetime);
        }
        let saved = files::replace_json(&*self.platform, &self.path, &inner.stored);
        inner.unsaved = saved.is_err();
        saved
    }
}

fn enroll_error(error: CallError) -> EnrollError {
    match error {
        CallError::Status { status, body, .. } if (400..500).contains(&status) && status != 429 => {
            EnrollError::Refused(format!("{status} {body}"))
        }
        error => EnrollError::Transient { reason: error.to_string(), retry_after: error.retry_after() },
    }
}

fn transient(reason: &str) -> EnrollError {
    EnrollError::Transient { reason: reason.to_owned(), retry_after: None }
}

fn poll_pause(asked_ms: Option<u64>, default_ms: u64) -> Duration {
    Duration::from_millis(asked_ms.filter(|ms| *ms > 0).unwrap_or(default_ms).clamp(100, 300_000))
}

fn lifetime(expires_in: Option<i64>) -> i64 {
    let lifetime = expires_in.filter(|seconds| *seconds > 0).unwrap_or(DEFAULT_LIFETIME_SECONDS).min(MAX_LIFETIME_SECONDS);
    (lifetime - 5).max(1)
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{client, clock};

    fn open(dir: &std::path::Path) -> Account {
        let tls = client::tls(None).unwrap();
        let base = url::Url::parse("http://127.0.0.1:9").unwrap();
        let client = Client::new(base, &tls, Arc::new(clock::ServerClock::default())).unwrap();
        Account::open(platform::current(), client, dir, String::new()).unwrap()
    }

    fn admission(refresh: &str) -> PollResponse {
        PollResponse {
            status: "approved".into(),
            guid: Some("{0d2f7b1a-0000-4000-8000-00000000abcd}".into()),
            access_token: Some("access".into()),
            refresh_token: Some(refresh.into()),
            expires_in: Some(900),
            signing_key: Some(keys::spki_base64(&SigningKey::from_bytes(&[9; 32]).verifying_key())),
            ..PollResponse::default()
        }
    }

    #[test]
    fn only_the_engines_own_code_ends_an_account() {
        let json = |code: &str| format!(r#"{{"error":"{code}","message":"m"}}"#);
        for code in FINAL_REFRESH_ERRORS {
            for status in [401, 403, 404] {
                assert_eq!(reaction_to(status, &json(code)), Reaction::Wipe, "{status} {code}");
            }
            for (status, body) in [
                (503, json(code)),
                (502, format!("<html>{code}</html>")),
                (403, format!("<html>{code}</html>")),
                (403, code.to_owned()),
                (403, format!("\"{code}\"")),
                (403, format!("[{}]", json(code))),
                (401, json(&format!("not {code}"))),
                (401, format!(r#"{{"message":"{code}"}}"#)),
                (401, format!(r#"{{"error":["{code}"]}}"#)),
                (401, format!(r#"{{"error":"unauthorized","message":"{code}"}}"#)),
                (200, json(code)),
                (400, json(code)),
                (401, String::new()),
            ] {
                assert_eq!(reaction_to(status, &body), Reaction::Keep, "{status} {body}");
            }
        }
        for code in PASSING_REFRESH_ERRORS {
            assert_eq!(reaction_to(401, &json(code)), Reaction::Refused, "{code}");
        }
        for code in
            ["token_refresh_unavailable", "auth_unavailable", "rate_limited", "revoked", "decommissioned", "token_version"]
        {
            assert_eq!(reaction_to(403, &json(code)), Reaction::Keep, "{code}");
        }
    }

    #[tokio::test]
    async fn identity_and_tokens_outlive_the_process_and_a_wipe_keeps_the_identity() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path());
        let fingerprint = first.fingerprint();
        assert!(!first.is_enrolled());
        assert!(matches!(first.bearer().await, Err(TokenError::NotEnrolled)));
        first.admit(admission("refresh"), "").unwrap();
        drop(first);

        let second = open(dir.path());
        assert_eq!(second.fingerprint(), fingerprint);
        assert_eq!(second.guid(), "0D2F7B1A-0000-4000-8000-00000000ABCD");
        assert!(second.engine_key("", &[]).is_some());
        assert_eq!(second.bearer().await.unwrap(), "access");
        second.distrust_access_token();
        assert!(matches!(second.bearer().await, Err(TokenError::Transient { .. })), "no engine there to refresh with");
        assert!(second.is_enrolled(), "and that is no reason to give up the account");
        let lost = second.lost();
        second.wipe();
        assert!(lost.is_cancelled() && !second.is_enrolled());
        drop(second);

        let third = open(dir.path());
        assert_eq!(third.fingerprint(), fingerprint);
        assert!(!third.is_enrolled());
    }

    #[test]
    fn the_script_key_is_followed_and_the_former_one_counts_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let account = open(dir.path());
        account.admit(admission("refresh"), "").unwrap();
        let key = |seed: u8| SigningKey::from_bytes(&[seed; 32]);
        let public = |seed: u8| keys::spki_base64(&key(seed).verifying_key());
        let chain = [Succession::sign(&key(9), &key(10).verifying_key())];
        let used = |account: &Account, announced: &str, chain: &[Succession]| {
            keys::spki_base64(&account.engine_key(announced, chain).expect("a key"))
        };
        // Nobody takes its place without its word.
        let forged = [Succession::sign(&key(8), &key(10).verifying_key())];
        for chain in [&[][..], &forged] {
            assert_eq!(used(&account, &public(10), chain), public(9));
        }
        // That it is named does not make it the one.
        assert_eq!(used(&account, &public(9), &chain), public(9));
        assert_eq!(used(&account, &public(10), &chain), public(10));
        // Another process of the engine has not changed yet.
        assert_eq!(used(&account, &public(9), &[]), public(9));
        assert_eq!(used(&account, "", &[]), public(10));
        drop(account);

        let again = open(dir.path());
        assert_eq!(used(&again, &public(9), &[]), public(9));
        again.write(None, |stored| stored.former_signing_key.as_mut().expect("a former key").until = local_now() - 1).unwrap();
        assert_eq!(used(&again, &public(9), &[]), public(10), "its time is over");
        again.admit(admission("another"), "").unwrap();
        assert_eq!(used(&again, "", &[]), public(9), "an enrollment begins again");
    }

    #[test]
    fn an_answer_without_tokens_or_with_a_foreign_key_admits_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let account = open(dir.path());
        assert!(account.admit(PollResponse { refresh_token: None, ..admission("r") }, "").is_err());
        assert!(account.admit(PollResponse { signing_key: Some("AAAA".into()), ..admission("r") }, "").is_err());
        assert!(account.admit(PollResponse { signing_key: None, ..admission("r") }, "").is_err());
        assert!(!account.is_enrolled());
    }

    #[test]
    fn the_file_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let _account = open(dir.path());
        let mode = std::fs::metadata(dir.path().join("agent.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn lifetimes_are_sane() {
        assert_eq!(lifetime(Some(900)), 895);
        assert_eq!(lifetime(None), 895);
        assert_eq!(lifetime(Some(-4)), 895);
        assert_eq!(lifetime(Some(3)), 1);
        assert_eq!(lifetime(Some(i64::MAX)), MAX_LIFETIME_SECONDS - 5);
    }
}
