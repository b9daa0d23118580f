//! A real browser without a window: Chromium, driven over WebDriver, with a virtual authenticator for passkeys.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde_json::{Value, json};
use url::Url;

use crate::{
    actor::client,
    eventually,
    processes::{Child, Processes, free_port},
};

/// A browser with an empty profile and one authenticator, which is asked and answers without a person. Dropping it ends it.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    /// The browser itself, which outlives its driver.
    pid: Option<i32>,
    base: Url,
    session: String,
    authenticator: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts it.
    ///
    /// # Panics
    /// When Chromium or its driver (Debian: `chromium`, `chromium-driver`) cannot be started.
    pub async fn start(processes: &mut Processes) -> Self {
        let port = free_port();
        let driver = processes.start_program("chromedriver".as_ref(), &[&format!("--port={port}")]);
        let base = Url::parse(&format!("http://127.0.0.1:{port}/")).expect("a URL");
        eventually("the driver of the browser listens", Duration::from_secs(30), async || {
            let status = client().get(format!("{base}status")).send().await.ok()?;
            status.status().is_success().then_some(())
        })
        .await;
        let profile = tempfile::Builder::new().prefix("borealis-browser-").tempdir().expect("a folder");
        let mut arguments: Vec<String> = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        .map(str::to_owned)
        .into();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments},
            "webauthn:virtualAuthenticators": true,
        }}});
        let mut browser =
            Self { driver, pid: None, base, session: String::new(), authenticator: String::new(), _profile: profile };
        let started = browser.command(Method::POST, "session", Some(wanted)).await;
        browser.session = text(&started["sessionId"]);
        browser.pid = started["capabilities"]["goog:processID"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let authenticator = json!({
            "protocol": "ctap2",
            "transport": "internal",
            "hasResidentKey": true,
            "hasUserVerification": true,
            "isUserConsenting": true,
            "isUserVerified": true,
        });
        browser.authenticator = text(&browser.post("webauthn/authenticator", authenticator).await);
        browser
    }

    async fn command(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let request = client().request(method, format!("{}{path}", self.base));
        let request = if let Some(body) = body { request.json(&body) } else { request };
        let answer = request.send().await.unwrap_or_else(|error| panic!("{path}: {error:?}\n{}", self.driver.output()));
        let status = answer.status();
        let answer: Value = answer.json().await.unwrap_or_else(|error| panic!("{path}: {error:?}"));
        assert!(status.is_success(), "{path}: {} {}", answer["value"]["error"], answer["value"]["message"]);
        answer["value"].clone()
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        self.command(Method::POST, &format!("session/{}/{path}", self.session), Some(body)).await
    }

    /// Goes to a page and waits until it is there.
    pub async fn open(&self, page: &Url) {
        let _ = self.post("url", json!({"url": page.as_str()})).await;
    }

    /// Calls an async function of the page and gives what it returns, or `{"thrown": "NameOfTheError"}`.
    pub async fn call(&self, function: &str, arguments: Value) -> Value {
        let script =
            format!("const done = arguments[1]; {function}(...arguments[0]).then(done, thrown => done({{thrown: thrown.name}}))");
        self.post("execute/async", json!({"script": script, "args": [arguments]})).await
    }

    /// What the authenticator keeps: `credentialId`, `privateKey`, `rpId`, `userHandle`, `signCount`, ...
    pub async fn credentials(&self) -> Vec<Value> {
        let path = format!("session/{}/webauthn/authenticator/{}/credentials", self.session, self.authenticator);
        self.command(Method::GET, &path, None).await.as_array().cloned().unwrap_or_default()
    }

    /// Gives the authenticator a credential of this form in place of the one with the same id.
    pub async fn replace_credential(&self, credential: Value) {
        let at = format!("webauthn/authenticator/{}", self.authenticator);
        let path = format!("session/{}/{at}/credentials/{}", self.session, text(&credential["credentialId"]));
        let _ = self.command(Method::DELETE, &path, None).await;
        let _ = self.post(&format!("{at}/credential"), credential).await;
    }

    /// Whether the authenticator can tell that it is its owner who touches it.
    pub async fn verifies_user(&self, verifies: bool) {
        let at = format!("webauthn/authenticator/{}", self.authenticator);
        let _ = self.post(&format!("{at}/uv"), json!({"isUserVerified": verifies})).await;
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}
