//! The engine behind the proxies of docs/operations.md, each run for real with the text of that page: people sign in, an agent's
//! socket opens and answers, and the audit has the client's address, whatever the client says of itself.

use std::{
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use borealis_tests::{
    Actor, TestEngine,
    actor::Credential,
    agent,
    directory::Certificates,
    engine::PASSWORD,
    eventually,
    postgres::{as_service_user, give_to_service_user},
    processes::free_port,
    totp,
};
use serde_json::{Value, json};

/// A client that is not the proxy: both are on this machine, and only the proxy's address is trusted.
const CLIENT: &str = "127.0.0.7";

/// A proxy. Dropping it ends it.
struct Proxy {
    name: &'static str,
    port: u16,
    child: Child,
    folder: PathBuf,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            eprintln!("---- {} ----\n{log}", self.name);
        }
    }
}

/// The block of that language in the page.
fn documented(language: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, rest) = page.split_once(&format!("```{language}\n")).unwrap_or_else(|| panic!("no block {language}"));
    rest.split_once("```").unwrap().0.to_owned()
}

/// Starts a proxy on the documented text, of which only names, addresses and files are replaced.
fn start(name: &'static str, engine: std::net::SocketAddr, folder: &Path, certificates: &Certificates) -> Proxy {
    let port = free_port();
    let folder = folder.join(name);
    std::fs::create_dir(&folder).unwrap();
    certificates.write(&folder);
    let both = std::fs::read_to_string(folder.join("server.pem")).unwrap() + certificates.key();
    std::fs::write(folder.join("both.pem"), both).unwrap();
    let at = folder.display();
    let text = documented(name)
        .replace("rmm.example.org", "localhost")
        .replace("/etc/ssl/rmm", &at.to_string())
        .replace("127.0.0.1:8080", &engine.to_string());
    let text = match name {
        "nginx" => {
            let text = text.replace("listen 443", &format!("listen 127.0.0.1:{port}"));
            format!(
                "daemon off; pid {at}/pid; error_log stderr; worker_processes 1;\nevents {{}}\nhttp {{\naccess_log off;\n\
                 client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/f; uwsgi_temp_path {at}/u; \
                 scgi_temp_path {at}/s;\n{text}}}\n"
            )
        }
        "haproxy" => text.replace("bind :443", &format!("bind 127.0.0.1:{port}")),
        // It has the certificate from us, and no port 80.
        "caddy" => format!(
            "{{\nadmin off\nauto_https disable_redirects\n}}\n{}",
            text.replace("localhost {", &format!("https://localhost:{port} {{\ntls {at}/server.pem {at}/key.pem"))
        ),
        "apache" => {
            let text = text.replace("*:443", &format!("127.0.0.1:{port}"));
            let modules: String = ["mpm_event", "authz_core", "ssl", "proxy", "proxy_http"]
                .map(|module| format!("LoadModule {module}_module /usr/lib/apache2/modules/mod_{module}.so\n"))
                .concat();
            format!(
                "ServerRoot {at}\nServerName localhost\nPidFile {at}/pid\nDefaultRuntimeDir {at}\nErrorLog {at}/log\n\
                 {modules}Listen 127.0.0.1:{port}\n{text}"
            )
        }
        other => panic!("no proxy {other}"),
    };
    let config = folder.join("Caddyfile");
    std::fs::File::create(&config).unwrap().write_all(text.as_bytes()).unwrap();
    let (program, arguments): (&str, &[&str]) = match name {
        "nginx" => ("/usr/sbin/nginx", &["-c"]),
        "haproxy" => ("/usr/sbin/haproxy", &["-db", "-f"]),
        "caddy" => ("/usr/bin/caddy", &["run", "--adapter", "caddyfile", "--config"]),
        _ => ("/usr/sbin/apache2", &["-D", "FOREGROUND", "-f"]),
    };
    let log = std::fs::File::create(folder.join("log")).unwrap();
    give_to_service_user(&folder);
    let mut command: Command = as_service_user(Path::new(program));
    command.args(arguments).arg(&config).env("HOME", &folder).env("XDG_DATA_HOME", &folder).env("XDG_CONFIG_HOME", &folder);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    let child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
    Proxy { name, port, child, folder }
}

/// What goes through each proxy, as a client with this address.
struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    async fn post(&self, path: &str, body: Value) -> Value {
        let request = self.http.post(format!("{}{path}", self.base)).json(&body);
        // A forged address, which must not be believed.
        let answer = request.header("x-forwarded-for", "203.0.113.9").send().await.unwrap();
        let (status, body) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{path}: {status} {body}");
        serde_json::from_str(&body).unwrap()
    }
}

#[tokio::test]
async fn the_documented_proxies_pass_everything_on() {
    let engine = TestEngine::with(|settings| settings.trusted_proxies = "127.0.0.1".parse().unwrap()).await;
    let certificates = Certificates::for_name("localhost");
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (site, _) = engine.site("Lab").await;
    let admin = engine.admin().await;
    let mut roots = rustls::RootCertStore::empty();
    let authority: rustls::pki_types::CertificateDer<'_> =
        rustls::pki_types::pem::PemObject::from_pem_slice(certificates.authority.as_bytes()).unwrap();
    roots.add(authority).unwrap();

    let proxies = ["nginx", "haproxy", "caddy", "apache"].map(|name| start(name, engine.addr, folder.path(), &certificates));
    for proxy in &proxies {
        let name = proxy.name;
        let http = reqwest::Client::builder()
            .no_proxy()
            .local_address(CLIENT.parse::<IpAddr>().unwrap())
            .tls_backend_preconfigured(
                rustls::ClientConfig::builder().with_root_certificates(roots.clone()).with_no_client_auth(),
            )
            .build()
            .unwrap();
        let client = Client { http, base: format!("https://localhost:{}", proxy.port) };
        eventually(&format!("{name} answers"), Duration::from_secs(60), async || {
            let answer = client.http.get(format!("{}/ready", client.base)).send().await.ok()?;
            (answer.status() == 200).then_some(())
        })
        .await;

        // A person signs in.
        let username = engine.user("User", &[site]).await;
        let pending = client.post("/api/auth/login", json!({"username": username, "password": PASSWORD})).await;
        let secret = pending["secret"].as_str().unwrap_or_else(|| panic!("{name}: {pending}"));
        let body = json!({"pending_token": pending["pending_token"], "code": totp::code(secret, 0)});
        let done = client.post("/api/auth/mfa/verify", body).await;
        let session = done["token"].as_str().unwrap_or_else(|| panic!("{name}: {done}"));
        let me = client.http.get(format!("{}/api/auth/me", client.base)).bearer_auth(session).send().await.unwrap();
        assert_eq!(me.json::<Value>().await.unwrap()["username"], username, "{name}");
        assert_eq!(address_of(&admin, &username).await, CLIENT, "{name}");

        // An agent's socket opens, and both sides are heard.
        let device = engine.device(site).await;
        let Credential::Bearer(token) = &device.actor.credential else { panic!("a device has a token") };
        let url = format!("wss://localhost:{}", proxy.port);
        let mut socket =
            agent::open_agent_over_tls(&url, &roots, token).await.unwrap_or_else(|status| panic!("{name}: {status}"));
        let id = borealis_protocol::agent_id(&device.hostname, &device.guid, "SYSTEM");
        let welcome = socket.hello(&id, json!({})).await;
        assert!(welcome.is_object(), "{name}: {welcome}");

        // A large body gets through; by default nginx takes one MiB.
        let script = format!("true\n# {}", "x".repeat(2 * 1024 * 1024));
        let assembly = json!({"domain": "user", "display_name": format!("Large {name}"), "assembly_type": "script",
            "assembly_subtype": "bash", "payload": {"name": "Large", "type": "bash", "script": script, "timeout_seconds": 60}});
        let request = client.http.post(format!("{}/api/assemblies", client.base)).bearer_auth(session).json(&assembly);
        let answer = request.send().await.unwrap();
        let (status, said) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{name}: {status} {said}");
    }
}

/// From where a user has signed in last, as the audit says.
async fn address_of(admin: &Actor, username: &str) -> String {
    let found = admin.get(&format!("/api/audit?action=session.login&actor={username}")).await.ok();
    let events = found["events"].as_array().unwrap_or_else(|| panic!("no events in {found}"));
    let event = events.first().unwrap_or_else(|| panic!("no sign-in in {found}"));
    event["ip"].as_str().unwrap_or_else(|| panic!("no address in {event}")).to_owned()
}
