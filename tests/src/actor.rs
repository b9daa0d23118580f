//! Who talks to the engine over HTTP, and what comes back.

use std::sync::LazyLock;

use base64::{Engine, engine::general_purpose::STANDARD};
use borealis_engine::{
    error::catalogue::{CODES, Code},
    internal::{self, Key, Signed},
};
use ed25519_dalek::{Signer, SigningKey, pkcs8::EncodePublicKey};
use reqwest::Method;
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

use crate::totp;

/// An answer of the engine.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The body, when it is JSON; else null.
    pub body: Value,
    /// The body as text.
    pub text: String,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
    request: String,
}

impl Reply {
    pub(crate) fn new(request: String, status: u16, headers: Vec<(String, String)>, text: String) -> Self {
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Self { status, body, text, headers, request }
    }

    /// The first value of a header, its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body of a success.
    ///
    /// # Panics
    /// When it is not 2xx.
    #[track_caller]
    #[must_use]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{} should succeed, got {}: {}", self.request, self.status, self.text);
        self.body
    }

    /// The answer, when it has this status.
    ///
    /// # Panics
    /// On any other status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{} answered: {}", self.request, self.text);
        self
    }

    /// The answer, when it is an error with this status and code, and has the form every error has.
    ///
    /// # Panics
    /// Otherwise.
    #[track_caller]
    pub fn error(self, status: u16, code: &str) -> Self {
        let found = (self.status, self.body["error"].as_str());
        assert_eq!(found, (status, Some(code)), "{} answered: {}", self.request, self.text);
        assert!(self.body["message"].as_str().is_some_and(|text| !text.is_empty()), "no message: {}", self.text);
        assert_eq!(self.body["request_id"].as_str(), self.header("x-request-id"), "no request id: {}", self.text);
        let known = CODES.iter().find(|known| known.code == code).unwrap_or_else(|| panic!("{code} is not in the catalogue"));
        assert!(
            statuses(known).contains(&status),
            "{} answered {code} with {status}: {:?} says the catalogue",
            self.request,
            known.kinds
        );
        self
    }
}

/// The statuses that a code of the catalogue comes with.
#[must_use]
pub fn statuses(code: &Code) -> Vec<u16> {
    let special = match code.code {
        "method_not_allowed" => Some(405),
        "uri_too_long" => Some(414),
        _ => None,
    };
    let mut statuses: Vec<u16> = match special {
        Some(status) => vec![status],
        None => code.kinds.iter().map(|kind| borealis_api::errors::status(*kind).as_u16()).collect(),
    };
    statuses.sort_unstable();
    statuses
}

/// How an actor proves who it is.
#[derive(Debug, Clone, Default)]
pub enum Credential {
    /// Not at all.
    #[default]
    None,
    /// With a session or access token in `Authorization`.
    Bearer(String),
    /// With a session cookie, as a browser does.
    Cookie(String),
    /// As a worker that knows this engine secret: every request is signed.
    Worker(String),
}

/// Somebody who talks to the engine.
#[derive(Debug, Clone)]
pub struct Actor {
    /// For messages: `admin`, `operator-1`, ...
    pub name: String,
    /// Where the engine is.
    pub base: Url,
    /// How this actor proves who it is.
    pub credential: Credential,
    /// The base32 secret of this operator's authenticator app.
    pub totp_secret: Option<String>,
    /// This operator's password.
    pub password: Option<String>,
}

pub(crate) fn client() -> &'static reqwest::Client {
    static CLIENT: LazyLock<reqwest::Client> = LazyLock::new(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Without a pool: every test has a runtime of its own, and a pooled connection dies with the runtime that made it.
        reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .timeout(std::time::Duration::from_secs(60))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .expect("an HTTP client")
    });
    &CLIENT
}

impl Actor {
    /// Nobody the engine knows.
    #[must_use]
    pub fn anonymous(base: &Url) -> Self {
        Self { name: "anonymous".into(), base: base.clone(), credential: Credential::None, totp_secret: None, password: None }
    }

    /// The same one at another API process.
    #[must_use]
    pub fn at(&self, base: &Url) -> Self {
        Self { base: base.clone(), ..self.clone() }
    }

    /// A request with these parts; a path with its query, and a JSON body.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let url = format!("{}{path}", self.base.as_str().trim_end_matches('/'));
        let request = client().request(method, url).header("Accept", "application/json");
        match &self.credential {
            // A worker signs what is sent, so it does so when it sends.
            Credential::None | Credential::Worker(_) => request,
            Credential::Bearer(token) => request.bearer_auth(token),
            Credential::Cookie(value) => {
                request.header("Cookie", format!("borealis_auth={value}")).header("Sec-Fetch-Site", "same-origin")
            }
        }
    }

    /// The headers with which it proves who it is, on a request with this method, target and body.
    #[must_use]
    pub fn proof(&self, method: &str, target: &str, body: &[u8]) -> Vec<(&'static str, String)> {
        match &self.credential {
            Credential::None => Vec::new(),
            Credential::Bearer(token) => vec![("authorization", format!("Bearer {token}"))],
            Credential::Cookie(value) => vec![("cookie", format!("borealis_auth={value}"))],
            Credential::Worker(secret) => {
                let (timestamp, nonce) = (chrono::Utc::now().timestamp().to_string(), internal::nonce());
                let worker = Uuid::new_v4().to_string();
                let signed =
                    Signed { method, path_and_query: target, timestamp: &timestamp, nonce: &nonce, worker: &worker, body };
                let signature = Key::derive(secret).sign(&signed);
                vec![
                    (internal::SIGNATURE_HEADER, signature),
                    (internal::TIMESTAMP_HEADER, timestamp),
                    (internal::NONCE_HEADER, nonce),
                    (internal::WORKER_HEADER, worker),
                ]
            }
        }
    }

    /// Sends a request made with [`Self::request`].
    pub async fn send(&self, request: reqwest::RequestBuilder) -> Reply {
        let mut request = request.build().expect("a request");
        if matches!(self.credential, Credential::Worker(_)) {
            let url = request.url();
            let target = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
            let body = request.body().and_then(|body| body.as_bytes()).unwrap_or_default();
            for (name, value) in self.proof(request.method().as_str(), &target, body) {
                request.headers_mut().insert(name, value.parse().expect("a header value"));
            }
        }
        let line = format!("{}: {} {}", self.name, request.method(), request.url().path());
        let response = client().execute(request).await.unwrap_or_else(|error| panic!("{line}: {error:?}"));
        let status = response.status().as_u16();
        let headers = response
            .headers()
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let text = response.text().await.unwrap_or_else(|error| panic!("{line}: {error:?}"));
        Reply::new(line, status, headers, text)
    }

    /// Any method, with or without a JSON body.
    pub async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Reply {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let request = self.request(method, path);
        self.send(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Reply {
        self.call("GET", path, None).await
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.call("POST", path, Some(&body)).await
    }

    /// PUT with a JSON body.
    pub async fn put(&self, path: &str, body: Value) -> Reply {
        self.call("PUT", path, Some(&body)).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Reply {
        self.call("DELETE", path, None).await
    }

    /// Signs in with password and authenticator app and returns the signed-in actor. The first time it sets the app up.
    /// `steps` is the step of the code used, from now: each can be used once.
    pub async fn sign_in(&self, username: &str, password: &str, steps: u64) -> Self {
        let pending = self.post("/api/auth/login", json!({"username": username, "password": password})).await.ok();
        assert_eq!(pending["status"], "mfa_required", "{pending}");
        let secret = pending["secret"].as_str().map(str::to_owned).or_else(|| self.totp_secret.clone());
        let secret = secret.unwrap_or_else(|| panic!("no authenticator secret for {username}: {pending}"));
        let done = self
            .post("/api/auth/mfa/verify", json!({"pending_token": pending["pending_token"], "code": totp::code(&secret, steps)}))
            .await
            .ok();
        self.signed_in(username, password, &secret, &done)
    }

    /// The actor that a login-complete answer makes of this one.
    #[must_use]
    pub fn signed_in(&self, username: &str, password: &str, secret: &str, done: &Value) -> Self {
        let token = done["token"].as_str().unwrap_or_else(|| panic!("no token in {done}")).to_owned();
        Self {
            name: username.to_owned(),
            base: self.base.clone(),
            credential: Credential::Bearer(token),
            totp_secret: Some(secret.to_owned()),
            password: Some(password.to_owned()),
        }
    }

    /// This operator as a browser: the same session in a cookie.
    #[must_use]
    pub fn as_browser(&self) -> Self {
        let Credential::Bearer(token) = &self.credential else { panic!("{} has no session", self.name) };
        Self { credential: Credential::Cookie(token.clone()), ..self.clone() }
    }
}

/// An enrolled machine, or one that wants to be.
#[derive(Debug, Clone)]
pub struct Device {
    /// Talks with the access token.
    pub actor: Actor,
    /// The GUID the engine gave.
    pub guid: String,
    /// The hostname it enrolled with.
    pub hostname: String,
    /// Its site.
    pub site_id: i64,
    /// The refresh token.
    pub refresh_token: String,
    /// The engine's key for scripts, base64 SPKI DER.
    pub signing_key: String,
    /// Its own key.
    pub key: SigningKey,
    /// The answer that gave the tokens.
    pub enrolled: Value,
}

impl std::ops::Deref for Device {
    type Target = Actor;

    fn deref(&self) -> &Actor {
        &self.actor
    }
}

/// An enrollment that waits for approval.
#[derive(Debug, Clone)]
pub struct Enrollment {
    actor: Actor,
    hostname: String,
    key: SigningKey,
    nonce: [u8; 32],
    /// The engine's answer to the request.
    pub answer: Value,
}

/// A new Ed25519 key.
#[must_use]
pub fn new_key() -> SigningKey {
    SigningKey::from_bytes(&rand::random())
}

/// A public key as agents send it: base64 of the SPKI DER.
#[must_use]
pub fn spki(key: &SigningKey) -> String {
    STANDARD.encode(key.verifying_key().to_public_key_der().expect("a public key").as_bytes())
}

impl Enrollment {
    /// Asks to be enrolled.
    pub async fn request(actor: &Actor, hostname: &str, code: &str, key: SigningKey) -> Self {
        let nonce: [u8; 32] = rand::random();
        let answer = actor
            .post(
                "/api/agent/enroll/request",
                json!({
                    "hostname": hostname,
                    "enrollment_code": code,
                    "agent_pubkey": spki(&key),
                    "client_nonce": STANDARD.encode(nonce),
                }),
            )
            .await
            .ok();
        assert_eq!(answer["status"], "pending", "{answer}");
        Self { actor: actor.clone(), hostname: hostname.to_owned(), key, nonce, answer }
    }

    /// The reference the engine gave.
    #[must_use]
    pub fn reference(&self) -> &str {
        self.answer["approval_reference"].as_str().expect("an approval reference")
    }

    /// The body of a poll, signed with `key`.
    #[must_use]
    pub fn proof(&self, key: &SigningKey) -> Value {
        let mut message = STANDARD.decode(self.answer["server_nonce"].as_str().expect("a server nonce")).expect("base64");
        message.extend_from_slice(self.reference().as_bytes());
        message.extend_from_slice(&self.nonce);
        json!({
            "approval_reference": self.reference(),
            "client_nonce": STANDARD.encode(self.nonce),
            "proof_sig": STANDARD.encode(key.sign(&message).to_bytes()),
        })
    }

    /// The body of a poll, signed with its own key.
    #[must_use]
    pub fn own_proof(&self) -> Value {
        self.proof(&self.key)
    }

    /// Asks for the outcome.
    pub async fn poll(&self) -> Reply {
        self.actor.post("/api/agent/enroll/poll", self.own_proof()).await
    }

    /// The device, after approval.
    ///
    /// # Panics
    /// When the engine does not give tokens.
    pub async fn finish(self, site_id: i64) -> Device {
        let enrolled = self.poll().await.ok();
        assert_eq!(enrolled["status"], "approved", "{enrolled}");
        let text = |name: &str| enrolled[name].as_str().unwrap_or_else(|| panic!("no {name} in {enrolled}")).to_owned();
        let mut actor = self.actor.clone();
        actor.name = format!("device {}", self.hostname);
        actor.credential = Credential::Bearer(text("access_token"));
        Device {
            actor,
            guid: text("guid"),
            hostname: self.hostname,
            site_id,
            refresh_token: text("refresh_token"),
            signing_key: text("signing_key"),
            key: self.key,
            enrolled,
        }
    }
}
