//! Directories: slapd over LDAPS, StartTLS and plain, and a Samba domain controller; each started here.

use std::time::Duration;

use borealis_tests::{
    Actor, Processes, Reply, TestEngine,
    actor::Credential,
    directory::{Certificates, DomainController, Slapd, group, person},
    engine::{ADMIN, PASSWORD},
    eventually, totp,
};
use serde_json::{Value, json};

const ADA: &str = "the engine weaves";
const BOB: &str = "bricks and mortar";
const PROVIDERS: &str = "/api/directory/providers";

fn tree() -> String {
    let base = Slapd::BASE;
    let mut tree = String::new();
    for unit in ["people", "groups", "more"] {
        tree += &format!("dn: ou={unit},{base}\nchangetype: add\nobjectClass: organizationalUnit\nou: {unit}\n\n");
    }
    tree += &person("ada", "Ada Lovelace", ADA);
    tree += &person("bob", "Bob", BOB);
    tree += &person("carol", "Carol", "a quiet outsider");
    tree += &person("twin", "Twin", "which of them");
    tree += &person("twin", "Other Twin", "which of them").replace("ou=people", "ou=more");
    tree += &person(ADMIN, "An impostor", "let me in please");
    tree += &group("operators", &["uid=ada,ou=people", "uid=twin,ou=people"]);
    tree += &group("admins", &["uid=bob,ou=people", &format!("uid={ADMIN},ou=people")]);
    // Groups of groups: who operates is staff, and staff are north.
    tree += &group("staff", &["cn=operators,ou=groups"]);
    tree += &group("north", &["cn=staff,ou=groups"]);
    tree
}

fn group_dn(cn: &str) -> String {
    format!("CN={cn}, ou=groups, {}", Slapd::BASE)
}

/// An engine and a directory it may reach.
struct World {
    engine: TestEngine,
    admin: Actor,
    slapd: Slapd,
    processes: Processes,
}

impl World {
    async fn new() -> Self {
        let mut processes = Processes::new();
        let slapd = Slapd::start(&mut processes, &tree()).await;
        let allowed = format!("127.0.0.1:{},127.0.0.1:{}", slapd.port, slapd.tls_port);
        let engine = TestEngine::with(|settings| settings.access.egress = allowed.parse().expect("a policy")).await;
        let admin = stepped_up(&engine).await;
        Self { engine, admin, slapd, processes }
    }

    fn url(&self) -> String {
        format!("ldaps://{}:{}", Slapd::NAME, self.slapd.tls_port)
    }

    /// A provider that works.
    fn body(&self, name: &str) -> Value {
        json!({
            "name": name,
            "server_urls": [self.url()],
            "host_overrides": {Slapd::NAME: "127.0.0.1"},
            "tls_ca_pem": self.slapd.certificates.authority,
            "base_dn": Slapd::BASE,
            "bind_dn": Slapd::READER,
            "bind_password": borealis_tests::directory::READER_PASSWORD,
            "domain_suffix": "borealis.test",
            "group_mappings": [
                {"group_dn": group_dn("staff"), "role": "User"},
                {"group_dn": group_dn("admins"), "role": "Admin"},
            ],
        })
    }

    /// The provider with these changes, tested and switched on: its id.
    async fn provider(&self, changes: Value) -> i64 {
        let mut body = self.body("Borealis");
        for (name, value) in changes.as_object().expect("changes") {
            body[name] = value.clone();
        }
        let made = self.admin.post(PROVIDERS, body).await.ok();
        let id = made["provider"]["id"].as_i64().unwrap_or_else(|| panic!("no id in {made}"));
        let _ = self.admin.post(&format!("{PROVIDERS}/{id}/test"), json!({})).await.ok();
        let _ = self.patch(id, json!({"enabled": true})).await.ok();
        id
    }

    async fn patch(&self, id: i64, body: Value) -> Reply {
        self.admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&body)).await
    }

    /// Signs in. What was counted before is forgotten: how many may fail is tested elsewhere.
    async fn sign_in(&self, username: &str, password: &str) -> Reply {
        sqlx::query("DELETE FROM rate_counters").execute(&self.engine.database.pool).await.expect("a deletion");
        let login = json!({"username": username, "password": password});
        self.engine.anonymous().post("/api/auth/login", login).await
    }

    async fn user(&self, username: &str) -> Value {
        let users = self.admin.get("/api/users").await.ok();
        let users = users["users"].as_array().expect("users");
        users.iter().find(|user| user["username"] == username).cloned().unwrap_or(Value::Null)
    }

    /// The reasons of the refused sign-ins, the newest first.
    async fn refusals(&self) -> Vec<Value> {
        let audit = self.admin.get("/api/audit?action=session.login&outcome=failure").await.ok();
        audit["events"].as_array().expect("events").iter().map(|event| event["detail"]["reason"].clone()).collect()
    }
}

async fn stepped_up(engine: &TestEngine) -> Actor {
    let admin = engine.admin().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    admin
}

#[tokio::test]
async fn a_provider_is_written_as_it_is_asked_for_and_tells_no_secret() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    engine.age_step_ups().await;
    let _ = admin.post(PROVIDERS, json!({"name": "x"})).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    for (body, code) in [
        (json!({}), "name_required"),
        (json!({"name": "x", "server_urls": "http://x"}), "invalid_server_url"),
        (json!({"name": "x", "server_urls": [1]}), "invalid_server_url"),
        (json!({"name": "x", "host_overrides": {"dc1": "dc2"}}), "invalid_host_override"),
        (json!({"name": "x", "tls_ca_pem": "no certificate"}), "invalid_certificate"),
        (json!({"name": "x", "user_search_filter": "(uid={user}"}), "invalid_filter"),
        (json!({"name": "x", "user_search_filter": "(uid=ada)"}), "invalid_filter"),
        (json!({"name": "x", "username_attribute": "uid)(x"}), "invalid_attribute"),
        (json!({"name": "x", "kerberos_keytab_base64": "?"}), "invalid_keytab"),
        (json!({"name": "x", "base_dn": "a\nb"}), "invalid_text"),
        (json!({"name": "x", "group_search_filter": "(memberUid={user})"}), "invalid_filter"),
        (json!({"name": "x", "group_search_filter": "(memberUid={username}"}), "invalid_filter"),
        (json!({"name": "x", "group_mappings": [{"group_dn": "Operators", "role": "User"}]}), "invalid_dn"),
        (json!({"name": "x", "site_mappings": [{"group_dns": ["cn=a,b"], "site_ids": []}]}), "invalid_dn"),
    ] {
        let _ = admin.post(PROVIDERS, body).await.error(400, code);
    }
    let _ = admin.post(PROVIDERS, json!({"name": "x", "enabled": true})).await.error(409, "test_required");
    let nowhere = json!({"name": "x", "site_mappings": [{"group_dns": ["cn=a"], "site_ids": [99]}]});
    let _ = admin.post(PROVIDERS, nowhere).await.error(404, "site_not_found");

    let (site, _) = engine.site("North").await;
    let body = json!({
        "name": " Main ", "provider_type": "Active Directory", "priority": 7, "domain_suffix": "ad.test",
        "server_urls": "ldaps://dc1.ad.test, dc2.ad.test", "host_overrides": "dc1.ad.test=10.0.0.5",
        "bind_dn": "cn=x", "bind_password": " spaces stay ", "kerberos_realm": "ad.test", "kerberos_keytab_base64": "BQIAAAA=",
        "sync_interval_seconds": 5,
        "group_mappings": [{"group_dn": "cn=a,dc=x", "role": "admin"}, {"group_dn": "CN=A, DC=x", "role": "Admin"}, {"group_dn": "cn=b", "role": "chief"}],
        "site_mappings": [{"group_dns": ["cn=a"], "site_ids": [site, site]}, {"label": "empty"}],
    });
    let made = admin.post(PROVIDERS, body).await.expect(200);
    assert!(!made.text.contains("spaces stay") && !made.text.contains("BQIAAAA"), "{}", made.text);
    let provider = &made.body["provider"];
    for (field, value) in [
        ("name", json!("Main")),
        ("provider_type", json!("active_directory")),
        ("enabled", json!(false)),
        ("priority", json!(7)),
        ("server_urls", json!(["ldaps://dc1.ad.test", "dc2.ad.test"])),
        ("host_overrides", json!({"dc1.ad.test": "10.0.0.5"})),
        ("tls_required", json!(true)),
        ("bind_password_present", json!(true)),
        ("kerberos_keytab_present", json!(true)),
        ("kerberos_realm", json!("AD.TEST")),
        ("username_attribute", json!("sAMAccountName")),
        ("sync_interval_seconds", json!(60)),
        ("group_mappings", json!([{"group_dn": "cn=a,dc=x", "role": "Admin"}, {"group_dn": "cn=b", "role": "User"}])),
        ("last_test_status", json!("")),
    ] {
        assert_eq!(provider[field], value, "{field} of {provider}");
    }
    let mapping = &provider["site_mappings"][0];
    assert_eq!((&mapping["label"], &mapping["site_ids"]), (&json!("User Site Group 1"), &json!([site])), "{provider}");
    assert_eq!(provider["site_mappings"].as_array().map(Vec::len), Some(1));
    let sealed: Vec<Option<String>> = sqlx::query_scalar("SELECT bind_password_sealed FROM directory_providers")
        .fetch_all(&engine.database.pool)
        .await
        .expect("a row");
    assert!(sealed[0].as_ref().is_some_and(|sealed| sealed.starts_with("aegis:v2:")), "{sealed:?}");

    let id = provider["id"].as_i64().expect("an id");
    let patch = async |body: Value| admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&body)).await;
    let second = admin.post(PROVIDERS, json!({"name": "Second"})).await.ok()["provider"]["id"].clone();
    let _ = admin.post(PROVIDERS, json!({"name": "MAIN"})).await.error(409, "provider_name_exists");
    let _ = patch(json!({"name": "second"})).await.error(409, "provider_name_exists");
    let _ = patch(json!({"enabled": true})).await.error(409, "test_required");
    // What does not touch the servers leaves the password; what leads elsewhere forgets it.
    assert_eq!(patch(json!({"priority": 200})).await.ok()["provider"]["bind_password_present"], true);
    let moved = patch(json!({"host_overrides": {"dc1.ad.test": "10.0.0.6"}})).await.ok();
    assert_eq!(moved["provider"]["bind_password_present"], false, "{moved}");
    for less in
        [json!({"tls_required": false}), json!({"tls_ca_pem": Certificates::for_name("x").authority}), json!({"use_ldaps": true})]
    {
        let _ = patch(json!({"bind_password": "again"})).await.ok();
        let changed = patch(less.clone()).await.ok();
        assert_eq!(changed["provider"]["bind_password_present"], false, "{less}");
    }
    let both = patch(json!({"server_urls": ["ldaps://dc3.ad.test"], "bind_password": "again"})).await.ok();
    assert_eq!(both["provider"]["bind_password_present"], true, "{both}");
    assert_eq!(patch(json!({"bind_password": ""})).await.ok()["provider"]["bind_password_present"], false);

    // The audit tells who would become what.
    let audit = admin.get("/api/audit?action=directory.create").await.ok();
    let first = audit["events"].as_array().and_then(|events| events.last()).unwrap_or_else(|| panic!("no event in {audit}"));
    assert_eq!(first["detail"]["group_mappings"][0], json!({"group_dn": "cn=a,dc=x", "role": "Admin"}), "{first}");

    // In the order they are asked.
    let all = admin.get(PROVIDERS).await.ok();
    let names: Vec<&Value> = all["providers"].as_array().expect("providers").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["Second", "Main"]);
    let _ = admin.delete(&format!("{PROVIDERS}/{second}")).await.ok();
    let _ = admin.delete(&format!("{PROVIDERS}/{second}")).await.error(404, "provider_not_found");
    let _ = admin.call("PATCH", &format!("{PROVIDERS}/{second}"), Some(&json!({}))).await.error(404, "provider_not_found");
    for route in ["test", "sync"] {
        let _ = admin.post(&format!("{PROVIDERS}/{second}/{route}"), json!({})).await.error(404, "provider_not_found");
    }
}

#[tokio::test]
async fn a_server_is_trusted_for_its_certificate_only() {
    let world = World::new().await;
    let (admin, slapd) = (&world.admin, &world.slapd);
    let stranger = Certificates::for_name(Slapd::NAME);
    let starttls = format!("ldap://{}:{}", Slapd::NAME, slapd.port);
    let id = admin.post(PROVIDERS, world.body("Borealis")).await.ok()["provider"]["id"].as_i64().expect("an id");
    let test = async |changes: Value| {
        let mut body = json!({"bind_password": borealis_tests::directory::READER_PASSWORD});
        for (name, value) in changes.as_object().expect("changes") {
            body[name] = value.clone();
        }
        let _ = world.patch(id, body).await.ok();
        let reply = admin.post(&format!("{PROVIDERS}/{id}/test"), json!({})).await;
        let kept = admin.get(PROVIDERS).await.ok()["providers"][0].clone();
        assert_eq!((&kept["last_test_status"], &kept["last_test_message"]), (&reply.body["status"], &reply.body["message"]));
        (reply.status, reply.body["message"].as_str().unwrap_or_default().to_owned())
    };
    let (authority, own) = (&slapd.certificates.authority, &slapd.certificates.server);
    let good = [
        json!({}),
        // StartTLS, by the authority.
        json!({"server_urls": [starttls]}),
        // Pinned, even where the name is another one.
        json!({"server_urls": [world.url().replace(Slapd::NAME, "other.test")], "host_overrides": {"other.test": "127.0.0.1"}, "tls_ca_pem": own}),
        // The second server answers.
        json!({"server_urls": ["ldaps://127.0.0.1:9", world.url()], "host_overrides": {Slapd::NAME: "127.0.0.1"}, "tls_ca_pem": authority}),
        // Without TLS at all, for who insists.
        json!({"server_urls": [starttls], "tls_required": false, "tls_ca_pem": ""}),
    ];
    for changes in good {
        let (status, message) = test(changes.clone()).await;
        assert_eq!(status, 200, "{changes}: {message}");
    }
    let back = json!({"server_urls": [world.url()], "host_overrides": {Slapd::NAME: "127.0.0.1"}, "tls_required": true, "tls_ca_pem": authority});
    let bad = [
        (json!({"tls_ca_pem": stranger.authority}), "not trusted", "ldap_connect_failed"),
        (json!({"tls_ca_pem": stranger.server}), "another certificate than the pinned", "pinned_certificate_mismatch"),
        (json!({"tls_ca_pem": ""}), "not trusted", "ldap_connect_failed"),
        (json!({"server_urls": [starttls], "tls_ca_pem": stranger.authority}), "not trusted", "ldap_connect_failed"),
        (
            json!({"server_urls": [world.url().replace(Slapd::NAME, "other.test")], "host_overrides": {"other.test": "127.0.0.1"}}),
            "not trusted",
            "ldap_connect_failed",
        ),
        (json!({"bind_password": "wrong"}), "refuses the provider's own account", "directory_auth_failed"),
        (json!({"bind_password": ""}), "refuses the provider's own account", "directory_auth_failed"),
        (json!({"base_dn": "dc=nowhere"}), "base DN cannot be read", "directory_lookup_failed"),
        (json!({"server_urls": ["ldaps://127.0.0.1:9"]}), "cannot be reached", "ldap_connect_failed"),
        (json!({"server_urls": []}), "no server", "ldap_connect_failed"),
    ];
    for (changes, why, code) in bad {
        let (status, message) = test(back.clone()).await;
        assert_eq!(status, 200, "{message}");
        let (status, message) = test(changes.clone()).await;
        assert!(status == 502 && message.contains(why), "{changes}: {status} {message}");
        let lookup = admin.post(&format!("{PROVIDERS}/{id}/lookup-user"), json!({"username": "ada"})).await;
        let _ = lookup.error(502, code);
        let _ = world.patch(id, json!({"enabled": true})).await.error(409, "test_required");
        let _ = world.patch(id, json!({"base_dn": Slapd::BASE})).await.ok();
    }
    // A provider that is on stays on when a later test fails.
    let (status, _) = test(back).await;
    assert_eq!(status, 200);
    let _ = world.patch(id, json!({"enabled": true})).await.ok();
    let changed = world.patch(id, json!({"user_search_filter": "(cn={user})"})).await.ok();
    assert_eq!((&changed["provider"]["enabled"], &changed["provider"]["last_test_status"]), (&json!(false), &json!("")));

    // The certificate, for somebody who wants to pin it.
    let at = format!("{PROVIDERS}/certificate");
    let body = json!({"server_url": world.url(), "host_overrides": {Slapd::NAME: "127.0.0.1"}});
    let shown = admin.post(&at, body).await.ok()["certificate"].clone();
    assert_eq!(shown["pem"].as_str().map(|pem| pem.replace(['\r', '\n'], "")), Some(own.replace(['\r', '\n'], "")), "{shown}");
    assert_eq!((&shown["common_name"], &shown["dns_names"]), (&json!(Slapd::NAME), &json!([Slapd::NAME])), "{shown}");
    assert_eq!((&shown["requested_host"], &shown["connect_host"]), (&json!(Slapd::NAME), &json!("127.0.0.1")), "{shown}");
    assert_eq!(shown["sha256_fingerprint"].as_str().map(str::len), Some(95), "{shown}");
    let _ = admin.post(&at, json!({})).await.error(400, "missing_server");
    let _ = admin.post(&at, json!({"server_url": starttls})).await.error(400, "ldaps_required");
    let _ = admin.post(&at, json!({"server_url": "https://x"})).await.error(400, "invalid_server_url");
    let _ = admin
        .post(&at, json!({"server_url": format!("ldaps://127.0.0.1:{}", slapd.port)}))
        .await
        .error(502, "certificate_download_failed");
    // Nothing of the machine's own, and nothing of the engine's.
    let _ = admin.post(&at, json!({"server_url": "ldaps://127.0.0.1:636"})).await.error(403, "egress_refused");
    let _ = admin.post(&at, json!({"server_url": "ldaps://169.254.169.254"})).await.error(403, "egress_refused");
}

#[tokio::test]
async fn people_of_a_directory_sign_in_with_the_rights_of_their_groups() {
    let world = World::new().await;
    let (north, _) = world.engine.site("North").await;
    let (south, _) = world.engine.site("South").await;
    let id = world
        .provider(json!({"site_mappings": [
            {"label": "North", "group_dns": [group_dn("north")], "site_ids": [north]},
            {"label": "South", "group_dns": [group_dn("admins")], "site_ids": [south]},
        ]}))
        .await;
    let nobody = world.engine.anonymous();

    // The first time makes the account; a second factor follows, as for everybody. The role and the site come by way of
    // groups of groups.
    let ada = nobody.sign_in("ada", ADA, 0).await;
    let me = ada.get("/api/auth/me").await.ok();
    assert_eq!(
        (&me["username"], &me["display_name"], &me["role"], &me["auth_source"], &me["directory_provider_id"]),
        (&json!("ada"), &json!("Ada Lovelace"), &json!("User"), &json!("directory"), &json!(id)),
        "{me}"
    );
    let sites = ada.get("/api/sites").await.ok();
    assert_eq!(
        sites["sites"].as_array().map(|sites| sites.iter().map(|site| site["id"].clone()).collect()),
        Some(vec![json!(north)])
    );
    let user = world.user("ada").await;
    assert_eq!(
        (&user["directory_provider_name"], &user["directory_domain"]),
        (&json!("Borealis"), &json!("borealis.test")),
        "{user}"
    );

    // Again, by the domain in both forms and in any case, it is the same account.
    let again = Actor { totp_secret: ada.totp_secret.clone(), ..nobody.clone() }.sign_in("Ada@Borealis.Test", ADA, 1).await;
    assert_eq!(again.get("/api/auth/me").await.ok()["username"], "ada");
    let pending = world.sign_in("BOREALIS\\ada", ADA).await.ok();
    assert_eq!((&pending["username"], &pending["stage"]), (&json!("ada"), &json!("verify")), "{pending}");
    // An administrator by the directory.
    let bob = nobody.sign_in("bob", BOB, 0).await;
    assert_eq!(bob.get("/api/auth/me").await.ok()["role"], "Admin");

    // Whatever is wrong looks the same; the audit knows.
    for (name, password, reason) in [
        ("ada", "wrong", "wrong password"),
        ("nobody", "wrong", "unknown to the directory"),
        ("twin", "which of them", "several people of the directory have this name"),
        ("ada@elsewhere.test", ADA, "unknown to the directory"),
        ("*", ADA, "unknown to the directory"),
        ("ada)(uid=*", ADA, "unknown to the directory"),
    ] {
        let refused = world.sign_in(name, password).await.error(401, "invalid username or password");
        let plain = world.sign_in("nobody at all", "wrong").await.error(401, "invalid username or password");
        assert_eq!(refused.body["message"], plain.body["message"]);
        assert_eq!(world.refusals().await[1], reason, "{name}");
    }
    let _ = world.sign_in("ada", "").await.error(400, "missing credentials");
    // What is wrong with the account itself is said only to who knows the password.
    let _ = world.sign_in("carol", "a quiet outsider").await.error(403, "directory_group_not_allowed");
    let _ = world.sign_in("carol", "wrong").await.error(401, "invalid username or password");
    // A local account keeps its name: a directory cannot take the administrator's.
    let _ = world.sign_in(ADMIN, "let me in please").await.error(401, "invalid username or password");
    let _ = world.sign_in(&format!("{ADMIN}@borealis.test"), "let me in please").await.error(409, "directory_username_conflict");

    // However it is spelled, a person has five failures; the directory is not asked about more, not even the right password.
    sqlx::query("DELETE FROM rate_counters").execute(&world.engine.database.pool).await.expect("a deletion");
    for name in ["\u{ff41}da", "a\u{ff44}a", "ad\u{ff41}", "\u{ff41}\u{ff44}a", "a\u{ff44}\u{ff41}"] {
        let wrong = json!({"username": name, "password": "wrong"});
        let _ = nobody.post("/api/auth/login", wrong).await.error(401, "invalid username or password");
        assert_eq!(world.refusals().await[0], "wrong password", "{name}");
    }
    let right = json!({"username": "ada", "password": ADA});
    let _ = nobody.post("/api/auth/login", right).await.error(429, "rate_limited");

    // The directory decides over the account.
    sqlx::query("DELETE FROM rate_counters").execute(&world.engine.database.pool).await.expect("a deletion");
    let _ = ada.post("/api/auth/step-up", json!({"password": "wrong"})).await.error(401, "invalid current password");
    let _ = ada.post("/api/auth/step-up", json!({"password": ADA})).await.ok();
    let change = json!({"current_password": ADA, "new_password": "an entirely new one"});
    let _ = ada.post("/api/auth/password/reset", change).await.error(403, "directory_user_local_action_disabled");
    let admin = &world.admin;
    let assign = json!({"usernames": ["ada"], "site_ids": [south]});
    let _ = admin.post("/api/user_site_assignments/assign", assign).await.error(409, "directory_managed");
    let _ = admin.post("/api/users/ada/role", json!({"role": "Admin"})).await.error(403, "directory_user_local_action_disabled");
    let _ = admin.post("/api/users/ada/mfa", json!({"enabled": false})).await.error(403, "directory_mfa_required");
    let _ = admin.delete("/api/users/ada").await.error(403, "directory_user_local_action_disabled");

    // Mappings count at once.
    let _ = world.patch(id, json!({"group_mappings": [{"group_dn": group_dn("staff"), "role": "User"}]})).await.ok();
    assert_eq!(bob.get("/api/auth/me").await.ok()["role"], "User");
    assert_eq!(bob.get("/api/sites").await.ok()["sites"], json!([]));

    // Switched off here, the account is out at once and stays out, until it is switched on.
    let cache = "/api/users/ada/directory-cache";
    let done = admin.post(cache, json!({})).await.ok();
    assert_eq!(done, json!({"status": "ok", "username": "ada", "directory_disabled": true}));
    let _ = ada.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = world.sign_in("ada", ADA).await.error(403, "directory_user_disabled");
    let _ = world.sign_in("ada", "wrong").await.error(401, "invalid username or password");
    let _ = admin.post(cache, json!({"disabled": false})).await.ok();
    let open = world.sign_in("ada", ADA).await.ok();
    assert_eq!(open["stage"], "verify");
    let own = format!("/api/users/{ADMIN}/directory-cache");
    let _ = admin.post(&own, json!({"disabled": false})).await.error(400, "cannot_disable_self");
    let local = world.engine.user("User", &[]).await;
    let _ = admin.post(&format!("/api/users/{local}/directory-cache"), json!({})).await.error(404, "directory_user_not_found");
    let _ = admin.post("/api/users/%20/directory-cache", json!({})).await.error(400, "invalid_username");

    // A provider that is off lets nobody in, and puts out who is.
    let bob_again = Actor { totp_secret: bob.totp_secret.clone(), ..nobody.clone() };
    let _ = bob.post("/api/auth/step-up", json!({"password": BOB})).await.ok();
    let token = json!({"name": "x", "scopes": ["read"], "expires_in_days": 1});
    let token = bob.post("/api/auth/tokens", token).await.ok()["token"].as_str().expect("a token").to_owned();
    let program = Actor { credential: Credential::Bearer(token), ..nobody.clone() };
    let _ = program.get("/api/sites").await.ok();
    let off = world.patch(id, json!({"enabled": false})).await.ok();
    assert_eq!(off["provider"]["enabled"], false);
    let code = totp::code(ada.totp_secret.as_deref().expect("a secret"), 1);
    let late = json!({"pending_token": open["pending_token"], "code": code});
    let _ = nobody.post("/api/auth/mfa/verify", late).await.error(401, "invalid_session");
    let _ = bob.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = program.get("/api/sites").await.error(401, "unauthorized");
    let _ = bob_again
        .post("/api/auth/login", json!({"username": "bob", "password": BOB}))
        .await
        .error(401, "invalid username or password");

    // An account that is off can be removed, and after all of them the provider.
    let _ = admin.delete(&format!("{PROVIDERS}/{id}")).await.error(409, "provider_has_cached_users");
    for name in ["ada", "bob"] {
        let _ = admin.post(&format!("/api/users/{name}/directory-cache"), json!({"disabled": true})).await.ok();
        let _ = admin.delete(&format!("/api/users/{name}")).await.ok();
    }
    let _ = admin.delete(&format!("{PROVIDERS}/{id}")).await.ok();
}

#[tokio::test]
async fn a_lookup_tells_an_administrator_what_would_happen() {
    let world = World::new().await;
    let made = world.admin.post(PROVIDERS, world.body("Borealis")).await.ok();
    let at = format!("{PROVIDERS}/{}/lookup-user", made["provider"]["id"]);
    let found = world.admin.post(&at, json!({"username": "BOREALIS\\ada"})).await.ok();
    for (field, value) in [
        ("found", json!(true)),
        ("login", json!("BOREALIS\\ada")),
        ("account", json!("ada")),
        ("display_name", json!("Ada Lovelace")),
        ("dn", json!(format!("uid=ada,ou=people,{}", Slapd::BASE))),
        ("group_count", json!(3)),
        ("mapped_role", json!("User")),
        ("allowed", json!(true)),
        ("password_checked", json!(false)),
        ("password_ok", Value::Null),
    ] {
        assert_eq!(found[field], value, "{field} of {found}");
    }
    assert!(found["subject"].as_str().is_some_and(|subject| subject.starts_with("uuid:")), "{found}");
    let right = world.admin.post(&at, json!({"username": "ada", "password": ADA})).await.ok();
    assert_eq!((&right["password_checked"], &right["password_ok"]), (&json!(true), &json!(true)));
    let wrong = world.admin.post(&at, json!({"username": "ada", "password": "wrong"})).await.ok();
    assert_eq!(
        (&wrong["password_ok"], &wrong["password_error"]),
        (&json!(false), &json!("invalid_username_or_password")),
        "{wrong}"
    );
    let outsider = world.admin.post(&at, json!({"username": "carol"})).await.ok();
    assert_eq!((&outsider["allowed"], &outsider["mapped_role"]), (&json!(false), &json!("")), "{outsider}");
    let _ = world.admin.post(&at, json!({"username": " "})).await.error(400, "username_required");
    let _ = world.admin.post(&at, json!({"username": "nobody"})).await.error(404, "directory_user_not_found");
    let _ = world.admin.post(&at, json!({"username": "twin"})).await.error(409, "ambiguous_directory_username");
    assert_eq!(world.user("ada").await, Value::Null, "a lookup makes no account");
    let second = world.engine.second_admin().await;
    world.engine.age_step_ups().await;
    let _ = second.post(&at, json!({"username": "ada", "password": ADA})).await.error(403, "step_up_required");
}

#[tokio::test]
async fn groups_are_found_as_servers_name_and_limit_them() {
    let world = World::new().await;
    let base = Slapd::BASE;
    let id = world.provider(json!({})).await;
    let role = async |username: &str, group_dn: &str| {
        let _ = world.patch(id, json!({"group_mappings": [{"group_dn": group_dn, "role": "User"}]})).await.ok();
        let at = format!("{PROVIDERS}/{id}/lookup-user");
        world.admin.post(&at, json!({"username": username})).await.ok()["mapped_role"].clone()
    };

    // The server answers the name of this group with `\\2C`.
    world.slapd.modify(&format!(
        "dn: cn=Ops\\, Berlin (EU),ou=groups,{base}\nchangetype: add\nobjectClass: groupOfNames\ncn: Ops, Berlin (EU)\n\
         member: uid=carol,ou=people,{base}\n\n"
    ));
    assert_eq!(role("carol", &format!("cn=Ops\\, Berlin (EU),ou=groups,{base}")).await, "User");
    assert_eq!(role("carol", &format!("CN=\"ops, berlin  (eu)\", ou=groups, {base}")).await, "User");
    assert_eq!(role("carol", &format!("cn=Ops\\, Bonn (EU),ou=groups,{base}")).await, "");

    // In 700 groups, where the server answers 500 entries at most; one of them is in another group.
    let mut many = String::new();
    for number in 0..700 {
        many += &group(&format!("g{number}"), &["uid=carol,ou=people"]);
    }
    many += &group("outer", &["cn=g699,ou=groups"]);
    world.slapd.modify(&many);
    for cn in ["g0", "g699", "outer", "north"] {
        assert_eq!(role("carol", &group_dn(cn)).await, if cn == "north" { "" } else { "User" }, "{cn}");
    }

    // Groups that name their members by `memberUid`, and the one of the person's own number.
    let mut posix = format!(
        "dn: uid=carol,ou=people,{base}\nchangetype: modify\nadd: objectClass\nobjectClass: posixAccount\n-\nadd: uidNumber\n\
         uidNumber: 1000\n-\nadd: gidNumber\ngidNumber: 2000\n-\nadd: homeDirectory\nhomeDirectory: /home/carol\n\n"
    );
    for number in 0..600 {
        let members = if number > 0 { "memberUid: carol\n" } else { "" };
        posix += &format!(
            "dn: cn=p{number},ou=groups,{base}\nchangetype: add\nobjectClass: posixGroup\ncn: p{number}\ngidNumber: {}\n{members}\n",
            2000 + number
        );
    }
    world.slapd.modify(&posix);
    assert_eq!(role("carol", &group_dn("p599")).await, "", "not without a filter");
    let again = json!({"group_search_filter": "(&(objectClass=posixGroup)(|(memberUid={username})(gidNumber={gid})))"});
    let _ = world.patch(id, again).await.ok();
    // An answer that is cut off is no answer: somebody would lose a role.
    let at = format!("{PROVIDERS}/{id}/lookup-user");
    let _ = world.admin.post(&at, json!({"username": "carol"})).await.error(502, "directory_lookup_failed");
    let pager = json!({"bind_dn": Slapd::PAGER, "bind_password": borealis_tests::directory::READER_PASSWORD});
    let _ = world.patch(id, pager).await.ok();
    for cn in ["p0", "p1", "p599", "outer"] {
        assert_eq!(role("carol", &group_dn(cn)).await, "User", "{cn}");
    }
    assert_eq!(role("ada", &group_dn("p0")).await, "", "no number of her own");
}

#[tokio::test]
async fn the_filter_of_a_provider_decides_who_is_found() {
    let world = World::new().await;
    let base = Slapd::BASE;
    let filter = "(|(uid={user})(mail={login}))";
    let _ = world.provider(json!({"domain_suffix": "borealis.test", "user_search_filter": filter})).await;
    world
        .slapd
        .modify(&format!("dn: uid=ada,ou=people,{base}\nchangetype: modify\nreplace: mail\nmail: ada@elsewhere.example\n\n"));
    for typed in ["ada@elsewhere.example", "ADA@Elsewhere.example", "ada@borealis.test", "BOREALIS\\ada", "ada"] {
        let pending = world.sign_in(typed, ADA).await.ok();
        assert_eq!(pending["username"], "ada", "{typed}: {pending}");
    }
    // A domain that is not the provider's is part of the name.
    for typed in ["bob@elsewhere.example", "ELSEWHERE\\bob"] {
        let _ = world.sign_in(typed, BOB).await.error(401, "invalid username or password");
        assert_eq!(world.refusals().await[0], "unknown to the directory", "{typed}");
    }
}

#[tokio::test]
async fn a_sync_disables_who_is_gone_and_nobody_else() {
    let mut world = World::new().await;
    let id = world.provider(json!({})).await;
    let nobody = world.engine.anonymous();
    let ada = nobody.sign_in("ada", ADA, 0).await;
    let bob = nobody.sign_in("bob", BOB, 0).await;
    let sync = format!("{PROVIDERS}/{id}/sync");

    let quiet = world.admin.post(&sync, json!({})).await.ok();
    assert_eq!((&quiet["disabled_users"], &quiet["checked_users"], &quiet["unclear_users"]), (&json!(0), &json!(2), &json!(0)));

    // A server that is away, or whose base is gone, has said nothing.
    world.slapd.stop();
    let _ = world.admin.post(&sync, json!({})).await.error(502, "sync_failed");
    let provider = world.admin.get(PROVIDERS).await.ok()["providers"][0].clone();
    assert_eq!((&provider["last_sync_status"], &provider["enabled"]), (&json!("failed"), &json!(true)), "{provider}");
    let _ = ada.get("/api/auth/me").await.ok();
    // Nor does a sign-in say more than that it is refused.
    let _ = world.sign_in("ada", ADA).await.error(401, "invalid username or password");
    assert_eq!(world.refusals().await[0], "the directory could not be asked");
    world.slapd.start_again(&mut world.processes).await;

    // Roles follow the groups, and so do names.
    let base = Slapd::BASE;
    world.slapd.modify(&format!(
        "dn: cn=admins,ou=groups,{base}\nchangetype: modify\nadd: member\nmember: uid=ada,ou=people,{base}\n\n\
         dn: uid=ada,ou=people,{base}\nchangetype: modify\nreplace: displayName\ndisplayName: Countess\n\n"
    ));
    let _ = world.admin.post(&sync, json!({})).await.ok();
    let user = world.user("ada").await;
    assert_eq!((&user["role"], &user["display_name"]), (&json!("Admin"), &json!("Countess")), "{user}");
    // Moved and renamed there, it is the same account here.
    world.slapd.modify(&format!(
        "dn: uid=ada,ou=people,{base}\nchangetype: modrdn\nnewrdn: uid=countess\ndeleteoldrdn: 1\nnewsuperior: ou=more,{base}\n\n\
         dn: cn=admins,ou=groups,{base}\nchangetype: modify\nadd: member\nmember: uid=countess,ou=more,{base}\n\n"
    ));
    let moved = world.admin.post(&sync, json!({})).await.ok();
    assert_eq!(moved["disabled_users"], 0, "{moved}");
    assert_eq!(ada.get("/api/auth/me").await.ok()["username"], "countess");

    // Who is gone is out, by the engine's own clock.
    world.slapd.modify(&format!("dn: uid=bob,ou=people,{base}\nchangetype: delete\n\n"));
    sqlx::query("UPDATE directory_providers SET last_sync_at = now() - interval '2 minutes'")
        .execute(&world.engine.database.pool)
        .await
        .expect("an update");
    eventually("the sync has found out", Duration::from_secs(30), async || {
        (bob.get("/api/auth/me").await.status == 401).then_some(())
    })
    .await;
    assert_eq!(world.user("bob").await["directory_disabled"], 1);
    let _ = ada.get("/api/auth/me").await.ok();

    // All of them at once is more likely a mistake.
    world.slapd.modify(&person("dora", "Dora", "an explorer's word"));
    world.slapd.modify(&format!(
        "dn: cn=admins,ou=groups,{base}\nchangetype: modify\nadd: member\nmember: uid=dora,ou=people,{base}\n\n"
    ));
    let dora = nobody.sign_in("dora", "an explorer's word", 0).await;
    let _ = world.patch(id, json!({"group_mappings": [{"group_dn": group_dn("nobody"), "role": "User"}]})).await.ok();
    let refused = world.admin.post(&sync, json!({})).await.error(409, "mass_disable_unconfirmed");
    assert!(refused.body["message"].as_str().is_some_and(|text| text.contains("2 of 2")), "{}", refused.text);
    let _ = dora.get("/api/auth/me").await.ok();
    let done = world.admin.post(&sync, json!({"confirm_disable": true})).await.ok();
    assert_eq!(done["disabled_users"], 2, "{done}");
    let _ = dora.get("/api/auth/me").await.error(401, "unauthorized");
}

#[tokio::test]
async fn active_directory_signs_in_by_every_name_and_by_nested_groups() {
    let mut processes = Processes::new();
    let dc = DomainController::start(&mut processes).await;
    let (alice, locked) = ("Al1ce-Passw0rd!", "L0cked-Passw0rd!");
    for (name, password) in [("alice", alice), ("dave", locked), ("erin", locked)] {
        dc.tool(&["user", "create", name, password, &format!("--given-name={name}"), "--surname=Test"]);
    }
    dc.tool(&["user", "disable", "erin"]);
    for name in ["Operators", "Staff", "North"] {
        dc.tool(&["group", "add", name]);
    }
    dc.tool(&["group", "addmembers", "Operators", "alice,dave,erin"]);
    dc.tool(&["group", "addmembers", "Staff", "Operators"]);
    dc.tool(&["group", "addmembers", "North", "Staff"]);
    dc.tool(&["domain", "passwordsettings", "set", "--account-lockout-threshold=3"]);

    let engine = TestEngine::start().await;
    let admin = stepped_up(&engine).await;
    let (site, _) = engine.site("North").await;
    let dn = |cn: &str| format!("CN={cn},CN=Users,{}", DomainController::BASE);
    let body = json!({
        "name": "Domain", "provider_type": "ad", "server_urls": ["ldaps://dc1"],
        "host_overrides": {DomainController::NAME: dc.address.to_string()},
        "tls_ca_pem": dc.certificates.authority,
        "base_dn": DomainController::BASE,
        "bind_dn": DomainController::ADMINISTRATOR, "bind_password": DomainController::administrator_password(),
        "domain_suffix": "BOREALIS", "kerberos_realm": "ad.borealis.test",
        "group_mappings": [{"group_dn": dn("Staff"), "role": "User"}],
        "site_mappings": [{"group_dns": [dn("North")], "site_ids": [site]}],
    });
    let id = admin.post(PROVIDERS, body).await.ok()["provider"]["id"].as_i64().expect("an id");
    let at = |what: &str| format!("{PROVIDERS}/{id}/{what}");
    let tested = admin.post(&at("test"), json!({})).await;
    assert_eq!(tested.status, 200, "{}", tested.text);
    let enable = json!({"enabled": true});
    let _ = admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&enable)).await.ok();

    // By account, by principal name and by domain.
    let nobody = engine.anonymous();
    let first = nobody.sign_in("alice", alice, 0).await;
    let me = first.get("/api/auth/me").await.ok();
    assert_eq!((&me["username"], &me["role"]), (&json!("alice@ad.borealis.test"), &json!("User")), "{me}");
    let sites = first.get("/api/sites").await.ok();
    assert_eq!(sites["sites"][0]["id"], site, "{sites}");
    let again = Actor { totp_secret: first.totp_secret.clone(), ..nobody.clone() };
    let again = again.sign_in("Alice@AD.borealis.test", alice, 1).await;
    assert_eq!(again.get("/api/auth/me").await.ok()["username"], me["username"]);
    let pending = nobody.post("/api/auth/login", json!({"username": "BOREALIS\\alice", "password": alice})).await.ok();
    assert_eq!((&pending["username"], &pending["stage"]), (&me["username"], &json!("verify")), "{pending}");
    // Over StartTLS too.
    let starttls = json!({"server_urls": ["ldap://dc1"], "bind_password": DomainController::administrator_password()});
    let _ = admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&starttls)).await.ok();
    let tested = admin.post(&at("test"), json!({})).await;
    assert_eq!(tested.status, 200, "{}", tested.text);
    let _ = admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&enable)).await.ok();

    // What the domain says about an account is for administrators.
    let look = async |name: &str, password: &str| {
        admin.post(&at("lookup-user"), json!({"username": name, "password": password})).await.ok()
    };
    let erin = look("erin", locked).await;
    assert_eq!((&erin["password_ok"], &erin["allowed"]), (&json!(false), &json!(false)), "{erin}");
    assert_eq!(erin["password_message"], "the account is disabled", "{erin}");
    let refused = nobody.post("/api/auth/login", json!({"username": "erin", "password": locked})).await;
    let _ = refused.error(401, "invalid username or password");
    for _ in 0..3 {
        assert_eq!(look("dave", "wrong").await["password_message"], "wrong password");
    }
    assert_eq!(look("dave", locked).await["password_message"], "the account is locked");

    // The primary group, which the domain leaves out of the groups of an account, counts with the groups it is in.
    dc.tool(&["group", "add", "Everybody"]);
    dc.tool(&["group", "addmembers", "Everybody", "Domain Users"]);
    for nested in [true, false] {
        for cn in ["Domain Users", "Everybody"] {
            let change = json!({
                "nested_groups": nested,
                "group_mappings": [{"group_dn": dn("Staff"), "role": "User"}, {"group_dn": dn(cn), "role": "Admin"}],
            });
            let _ = admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&change)).await.ok();
            let found = admin.post(&at("lookup-user"), json!({"username": "alice"})).await.ok();
            let admitted = nested || cn == "Domain Users";
            assert_eq!(found["mapped_role"] == "Admin", admitted, "{cn}, nested: {nested}: {found}");
        }
    }
    let back = json!({"nested_groups": true, "group_mappings": [{"group_dn": dn("Staff"), "role": "User"}]});
    let _ = admin.call("PATCH", &format!("{PROVIDERS}/{id}"), Some(&back)).await.ok();

    // Disabled in the domain, the account is out after the next sync.
    dc.tool(&["user", "disable", "alice"]);
    let synced = admin.post(&at("sync"), json!({})).await.ok();
    assert_eq!(synced["disabled_users"], 1, "{synced}");
    let _ = first.get("/api/auth/me").await.error(401, "unauthorized");
}
