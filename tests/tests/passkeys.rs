//! Passkeys end to end: a page in a real browser, its virtual authenticator, a reverse proxy, and the engine behind it.

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, Method, StatusCode, Uri},
    response::{Html, IntoResponse, Response},
    routing,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use borealis_tests::{Actor, Browser, Processes, TestEngine, engine::PASSWORD, totp};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use url::Url;

const PAGE: &str = include_str!("passkeys.html");
const REGISTER: &str = "/api/auth/passkeys/register/verify";
const AUTHENTICATE: &str = "/api/auth/passkeys/authenticate/verify";

/// Serves the page, and hands everything else on to the engine, as the web server in front of an engine does.
async fn serve_page(listener: TcpListener, engine: Url) {
    let http = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let forward = move |method: Method, uri: Uri, mut headers: HeaderMap, body: Bytes| {
        let (http, engine) = (http.clone(), engine.clone());
        async move {
            headers.remove("host");
            let url = engine.join(&uri.to_string()).expect("a URL");
            let answer = http.request(method, url).headers(headers).body(body).send().await.expect("an answer");
            let mut response = Response::builder().status(answer.status());
            for (name, value) in answer.headers().iter().filter(|(name, _)| *name != "transfer-encoding") {
                response = response.header(name, value);
            }
            response.body(Body::from(answer.bytes().await.expect("a body"))).expect("a response")
        }
    };
    let page = Router::new()
        .route("/", routing::get(async || Html(PAGE)))
        .route("/favicon.ico", routing::get(async || StatusCode::NO_CONTENT.into_response()))
        .fallback(forward);
    axum::serve(listener, page).await.expect("a server");
}

/// An engine behind the page's address, with a browser on the page.
struct World {
    engine: TestEngine,
    browser: Browser,
    _processes: Processes,
}

impl World {
    async fn new() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let page = Url::parse(&format!("http://localhost:{port}/")).expect("a URL");
        let engine = TestEngine::with(|settings| settings.public_base_url = page.clone()).await;
        tokio::spawn(serve_page(listener, engine.base.clone()));
        let mut processes = Processes::new();
        let browser = Browser::start(&mut processes).await;
        browser.open(&page).await;
        Self { engine, browser, _processes: processes }
    }

    /// A request of the page: status and body.
    async fn api(&self, method: &str, path: &str, body: Value) -> Value {
        let arguments = if body.is_null() { json!([method, path]) } else { json!([method, path, body]) };
        self.browser.call("api", arguments).await
    }

    /// Signs a new operator in at the page, with password and code, ready to register a passkey.
    async fn operator(&self) -> Actor {
        let operator = self.engine.operator(&[]).await;
        let login = json!({"username": operator.name, "password": PASSWORD});
        let pending = ok(self.api("POST", "/api/auth/login", login).await);
        let code = totp::code(operator.totp_secret.as_deref().expect("a secret"), 1);
        let verify = json!({"pending_token": pending["pending_token"], "code": code});
        let _ = ok(self.api("POST", "/api/auth/mfa/verify", verify).await);
        let _ = ok(self.api("POST", "/api/auth/step-up", json!({"password": PASSWORD})).await);
        operator
    }

    /// The reasons of the refused sign-ins with a passkey, the newest first.
    async fn refusals(&self) -> Vec<Value> {
        let audit = self.engine.admin().await.get("/api/audit?action=session.passkey").await.ok();
        let events = audit["events"].as_array().unwrap_or_else(|| panic!("no events in {audit}"));
        events.iter().map(|event| event["detail"]["reason"].clone()).collect()
    }
}

#[track_caller]
fn ok(answer: Value) -> Value {
    assert_eq!(answer["status"], 200, "{answer}");
    answer["body"].clone()
}

#[track_caller]
fn error(answer: &Value, status: u16, code: &str) {
    assert_eq!((&answer["status"], &answer["body"]["error"]), (&json!(status), &json!(code)), "{answer}");
    assert!(answer["body"]["message"].as_str().is_some_and(|text| !text.is_empty()), "no message: {answer}");
}

#[tokio::test]
async fn a_passkey_signs_in_without_password_and_code() {
    let world = World::new().await;
    let browser = &world.browser;
    let operator = world.operator().await;

    // Registered from the page; the authenticator keeps it for the host, under a handle that names nobody.
    let registered = ok(browser.call("register", json!(["Laptop"])).await);
    assert_eq!(registered, json!({"status": "ok", "username": operator.name, "passkey_count": 1}));
    let kept = browser.credentials().await;
    assert_eq!(
        (kept.len(), &kept[0]["rpId"], &kept[0]["isResidentCredential"]),
        (1, &json!("localhost"), &json!(true)),
        "{kept:?}"
    );
    let all = ok(world.api("GET", "/api/auth/passkeys", Value::Null).await);
    let passkey = &all["passkeys"][0];
    assert_eq!((&all["passkey_count"], &passkey["label"], &passkey["last_used_at"]), (&json!(1), &json!("Laptop"), &json!(0)));
    assert_eq!(passkey["transports"], json!(["internal"]), "{all}");
    assert_eq!(ok(world.api("GET", "/api/auth/me", Value::Null).await)["passkey_count"], 1);
    // The authenticator knows that it is registered already.
    assert_eq!(browser.call("register", json!(["Again"])).await, json!({"thrown": "InvalidStateError"}));

    // Signed out, and in again without typing anything.
    let _ = ok(world.api("POST", "/api/auth/logout", Value::Null).await);
    error(&world.api("GET", "/api/auth/me", Value::Null).await, 401, "unauthorized");
    let done = ok(browser.call("signIn", json!([])).await);
    assert_eq!((&done["username"], &done["role"]), (&json!(operator.name), &json!("User")), "{done}");
    let me = ok(world.api("GET", "/api/auth/me", Value::Null).await);
    assert_eq!(me["username"], operator.name);
    let all = ok(world.api("GET", "/api/auth/passkeys", Value::Null).await);
    assert!(all["passkeys"][0]["last_used_at"].as_i64().is_some_and(|at| at > 0), "{all}");

    // A name by which its user knows it.
    let at = format!("/api/auth/passkeys/{}", all["passkeys"][0]["id"]);
    let renamed = ok(world.api("PATCH", &at, json!({"label": " Work laptop "})).await);
    assert_eq!((&renamed["passkey"]["label"], &renamed["passkey_count"]), (&json!("Work laptop"), &json!(1)));
    assert_eq!(ok(world.api("PATCH", &at, json!({"label": ""})).await)["passkey"]["label"], "Passkey");
    error(&world.api("PATCH", &at, json!({})).await, 400, "label_required");
    error(&world.api("PATCH", &at, json!({"label": "x".repeat(81)})).await, 400, "invalid_label");
    // Not one of another user, not even of an administrator.
    let admin = world.engine.admin().await;
    let _ = admin.call("PATCH", &at, Some(&json!({"label": "mine"}))).await.error(404, "passkey_not_found");
    let _ = admin.delete(&at).await.error(404, "passkey_not_found");

    // Removed, it signs nobody in.
    assert_eq!(ok(world.api("DELETE", &at, Value::Null).await), json!({"status": "ok", "removed": true, "passkey_count": 0}));
    error(&world.api("DELETE", &at, Value::Null).await, 404, "passkey_not_found");
    let _ = ok(world.api("POST", "/api/auth/logout", Value::Null).await);
    error(&browser.call("signIn", json!([])).await, 404, "passkey_not_configured");
    assert_eq!(world.refusals().await, ["unknown passkey"]);

    let audit = admin.get("/api/audit?object_kind=passkey").await.ok();
    let actions: Vec<&Value> = audit["events"].as_array().expect("events").iter().map(|event| &event["action"]).collect();
    assert_eq!(actions, ["passkey.remove", "passkey.rename", "passkey.rename", "passkey.create"], "{audit}");
}

#[tokio::test]
async fn a_copied_passkey_is_refused_and_told() {
    let world = World::new().await;
    let browser = &world.browser;
    let _ = world.operator().await;
    let _ = ok(browser.call("register", json!([])).await);
    let copy = browser.credentials().await.remove(0);
    let _ = ok(browser.call("signIn", json!([])).await);
    let _ = ok(browser.call("signIn", json!([])).await);

    // The copy was made before the sign-ins: its counter is behind.
    let original = browser.credentials().await.remove(0);
    assert!(original["signCount"].as_i64() > copy["signCount"].as_i64(), "{original} {copy}");
    browser.replace_credential(copy).await;
    error(&browser.call("signIn", json!([])).await, 400, "passkey_verification_failed");
    let reasons = world.refusals().await;
    assert!(reasons[0].as_str().is_some_and(|reason| reason.contains("counter went back")), "{reasons:?}");
    let counted: Vec<String> =
        sqlx::query_scalar("SELECT scope FROM rate_counters WHERE hits > 0 AND scope <> 'auth.ceremony' ORDER BY 1")
            .fetch_all(&world.engine.database.pool)
            .await
            .expect("the counters");
    assert_eq!(counted, ["auth.account_hour", "auth.address"], "it counts as a wrong password does");
    // The original goes on.
    browser.replace_credential(original).await;
    let _ = ok(browser.call("signIn", json!([])).await);

    // One that names another user is nobody's.
    let mut foreign = browser.credentials().await.remove(0);
    let mine = foreign["userHandle"].clone();
    foreign["userHandle"] = json!("AAAA");
    browser.replace_credential(foreign.clone()).await;
    error(&browser.call("signIn", json!([])).await, 400, "passkey_verification_failed");
    foreign["userHandle"] = mine;
    browser.replace_credential(foreign).await;
    let _ = ok(browser.call("signIn", json!([])).await);
}

/// What the authenticator signed, changed, and signed again with its key: by somebody who has all of it but the right place.
fn signed_anew(signed: &Value, key: &Value, change: impl FnOnce(&mut Vec<u8>, &mut Value)) -> Value {
    let bytes = |text: &Value| URL_SAFE_NO_PAD.decode(text.as_str().expect("text").trim_end_matches('=')).expect("base64url");
    let response = &signed["credential"]["response"];
    let mut about = bytes(&response["authenticatorData"]);
    let mut client: Value = serde_json::from_slice(&bytes(&response["clientDataJSON"])).expect("JSON");
    change(&mut about, &mut client);
    let client = client.to_string();
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &bytes(key), &random).expect("a key");
    let message = [about.as_slice(), &Sha256::digest(client.as_bytes())].concat();
    let signature = key.sign(&random, &message).expect("a signature");
    let mut forged = signed.clone();
    forged["credential"]["response"]["authenticatorData"] = json!(URL_SAFE_NO_PAD.encode(about));
    forged["credential"]["response"]["clientDataJSON"] = json!(URL_SAFE_NO_PAD.encode(client));
    forged["credential"]["response"]["signature"] = json!(URL_SAFE_NO_PAD.encode(signature));
    forged
}

#[tokio::test]
async fn what_was_signed_for_another_place_or_without_its_user_is_refused() {
    /// The user was there; was verified.
    const FLAGS: usize = 32;
    const VERIFIED: u8 = 4;
    let world = World::new().await;
    let browser = &world.browser;
    let _ = world.operator().await;
    let _ = ok(browser.call("register", json!([])).await);
    let key = browser.credentials().await[0]["privateKey"].clone();
    type Change = fn(&mut Vec<u8>, &mut Value);
    let cases: [(&str, Change); 6] = [
        ("another origin", |_, client| client["origin"] = json!("https://localhost.example")),
        ("another port's origin", |_, client| client["origin"] = json!("http://localhost:1")),
        ("another kind of ceremony", |_, client| client["type"] = json!("webauthn.create")),
        ("another challenge", |_, client| client["challenge"] = json!(URL_SAFE_NO_PAD.encode([7; 32]))),
        ("another host", |about, _| about[..32].copy_from_slice(&Sha256::digest(b"localhost.example"))),
        ("a user who was not verified", |about, _| about[FLAGS] &= !VERIFIED),
    ];
    for (name, change) in cases {
        let signed = browser.call("get", json!([])).await;
        let refused = world.api("POST", AUTHENTICATE, signed_anew(&signed, &key, change)).await;
        assert_eq!(refused["body"]["error"], "passkey_verification_failed", "{name}: {refused}");
        sqlx::query("DELETE FROM rate_counters").execute(&world.engine.database.pool).await.expect("a deletion");
    }
    // The forgery itself is good enough: with nothing changed it signs in.
    let signed = browser.call("get", json!([])).await;
    let _ = ok(world.api("POST", AUTHENTICATE, signed_anew(&signed, &key, |_, _| {})).await);
}

#[tokio::test]
async fn a_ceremony_works_once_for_its_user_with_what_the_authenticator_signed() {
    let world = World::new().await;
    let browser = &world.browser;
    let operator = world.operator().await;

    // A registration: not without its beginning, not for somebody else, not changed, not twice.
    let created = browser.call("create", json!(["Key"])).await;
    error(&world.api("POST", REGISTER, json!({"credential": created["credential"]})).await, 401, "passkey_pending");
    let unreadable = json!({"request_id": created["request_id"], "credential": {"id": 7}});
    error(&world.api("POST", REGISTER, unreadable).await, 400, "invalid_passkey");
    let other = world.engine.second_admin().await;
    let _ = other.post(REGISTER, created.clone()).await.error(401, "invalid_session");
    let unknown = json!({"request_id": "no such ceremony", "credential": created["credential"]});
    error(&world.api("POST", REGISTER, unknown).await, 401, "invalid_session");
    let another = browser.call("create", json!(["Key"])).await;
    let mixed = json!({"request_id": created["request_id"], "credential": another["credential"]});
    error(&world.api("POST", REGISTER, mixed).await, 400, "passkey_verification_failed");
    let _ = ok(world.api("POST", REGISTER, another.clone()).await);
    error(&world.api("POST", REGISTER, another.clone()).await, 401, "invalid_session");
    // Were the ceremony open again, the same key would still not be kept twice.
    let reopened = "UPDATE auth_challenges SET used_at = NULL";
    let _ = sqlx::query(reopened).execute(&world.engine.app.pool).await.expect("an update");
    error(&world.api("POST", REGISTER, another).await, 409, "passkey_already_registered");

    // A sign-in likewise.
    let signed = browser.call("get", json!([])).await;
    let mut forged = signed.clone();
    let signature = forged["credential"]["response"]["signature"].as_str().expect("a signature").to_owned();
    let middle = signature.len() / 2;
    let flipped = if &signature[middle..=middle] == "A" { "B" } else { "A" };
    forged["credential"]["response"]["signature"] =
        json!(format!("{}{flipped}{}", &signature[..middle], &signature[middle + 1..]));
    error(&world.api("POST", AUTHENTICATE, forged).await, 400, "passkey_verification_failed");
    error(&world.api("POST", AUTHENTICATE, json!({"credential": signed["credential"]})).await, 401, "passkey_pending");
    let unreadable = json!({"request_id": signed["request_id"], "credential": {}});
    error(&world.api("POST", AUTHENTICATE, unreadable).await, 400, "invalid_passkey");
    let _ = ok(world.api("POST", AUTHENTICATE, signed.clone()).await);
    error(&world.api("POST", AUTHENTICATE, signed).await, 401, "invalid_session");

    // Not after five minutes.
    let late = browser.call("get", json!([])).await;
    sqlx::query("UPDATE auth_challenges SET expires_at = now()").execute(&world.engine.app.pool).await.expect("an update");
    error(&world.api("POST", AUTHENTICATE, late).await, 401, "expired");

    // Not by somebody who merely holds the machine.
    browser.verifies_user(false).await;
    assert_eq!(browser.call("signIn", json!([])).await, json!({"thrown": "NotAllowedError"}));
    browser.verifies_user(true).await;

    // Not when the account may not sign in, and not with a password that was set by somebody else.
    let switch = "UPDATE users SET directory_disabled = $2 WHERE username = $1";
    let pool = &world.engine.app.pool;
    let _ = sqlx::query(switch).bind(&operator.name).bind(true).execute(pool).await.expect("an update");
    error(&browser.call("signIn", json!([])).await, 403, "user_disabled");
    let _ = sqlx::query(switch).bind(&operator.name).bind(false).execute(pool).await.expect("an update");
    let reset = format!("/api/users/{}/reset_password", operator.name);
    let admin = world.engine.admin().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post(&reset, json!({"password": "another one entirely"})).await.ok();
    error(&browser.call("signIn", json!([])).await, 404, "passkey_not_configured");
}

#[tokio::test]
async fn what_stands_against_a_registration_is_said() {
    // An address is not a name.
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let begin = "/api/auth/passkeys/register/options";
    let _ = operator.post(begin, json!({})).await.error(503, "passkeys_unavailable");
    let _ =
        engine.anonymous().post("/api/auth/passkeys/authenticate/options", json!({})).await.error(503, "passkeys_unavailable");

    let engine = TestEngine::with(|settings| settings.public_base_url = Url::parse("http://localhost:1/").expect("a URL")).await;
    let nobody = engine.anonymous();
    let early = "/api/auth/passkeys/authenticate/options";
    let _ = nobody.post(early, json!({})).await.error(423, "bootstrap_required");
    let operator = engine.operator(&[]).await;
    engine.age_step_ups().await;
    let _ = operator.post(begin, json!({})).await.error(403, "step_up_required");
    let _ = operator.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = operator.post(begin, json!({"label": "a\nb"})).await.error(400, "invalid_label");
    let begun = operator.call("POST", begin, None).await.ok();
    let options = &begun["options"];
    assert_eq!(options["rp"], json!({"id": "localhost", "name": "Borealis"}), "{options}");
    assert_eq!(options["authenticatorSelection"]["userVerification"], "required", "{options}");
    assert_eq!(options["authenticatorSelection"]["residentKey"], "required", "{options}");
    assert_eq!(options["attestation"], "none", "{options}");

    let pool = &engine.app.pool;
    let many = "INSERT INTO passkeys (user_id, label, lookup_tag, credential_sealed)
                SELECT id, 'Key', sha256(i::text::bytea), 'x' FROM users, generate_series(1, 20) i WHERE username = $1";
    let _ = sqlx::query(many).bind(&operator.name).execute(pool).await.expect("passkeys");
    let _ = operator.post(begin, json!({})).await.error(409, "too_many_passkeys");
    assert_eq!(operator.get("/api/auth/me").await.ok()["passkey_count"], 20);

    // Accounts of the directory sign in there.
    let directory = engine.operator(&[]).await;
    let _ = directory.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let switch = "UPDATE users SET auth_source = 'directory' WHERE username = $1";
    let _ = sqlx::query(switch).bind(&directory.name).execute(pool).await.expect("an update");
    let _ = directory.post(begin, json!({})).await.error(403, "passkeys_local_users_only");

    // Nobody fills the table of ceremonies.
    let mut last = nobody.post(early, json!({})).await;
    for _ in 0..300 {
        last = nobody.post(early, json!({})).await;
    }
    let refused = last.error(429, "rate_limited");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
}
