//! Real directories: slapd on loopback, and a Samba domain controller in a network namespace of its own.

use std::{
    io::Write as _,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpStream;

use crate::{
    eventually,
    processes::{Child, Processes, free_port},
};

/// The password of the directory's administrator.
pub const ROOT_PASSWORD: &str = "the root of the tree";
/// The password of the account the engine binds with.
pub const READER_PASSWORD: &str = "reads and reads";

/// A certificate authority and a server's certificate by it.
#[derive(Debug)]
pub struct Certificates {
    /// The authority, as PEM.
    pub authority: String,
    /// The server's certificate, as PEM.
    pub server: String,
    key: String,
}

impl Certificates {
    /// New ones for a name.
    #[must_use]
    pub fn for_name(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([name.to_owned()]).expect("parameters");
        params.is_ca = IsCa::ExplicitNoCa;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let server = params.signed_by(&key, &authority).expect("a certificate");
        Self { authority: authority.pem(), server: server.pem(), key: key.serialize_pem() }
    }

    /// The server's private key, as PEM.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Writes `authority.pem`, `server.pem` and `key.pem`, the last for its owner only.
    pub fn write(&self, folder: &Path) {
        for (file, text) in [("authority.pem", &self.authority), ("server.pem", &self.server), ("key.pem", &self.key)] {
            std::fs::write(folder.join(file), text).expect("a file");
        }
        std::fs::set_permissions(folder.join("key.pem"), std::fs::Permissions::from_mode(0o600)).expect("a private file");
    }
}

async fn listens(address: impl tokio::net::ToSocketAddrs + Copy) {
    eventually("the directory listens", Duration::from_secs(60), async || TcpStream::connect(address).await.ok()).await;
}

/// An LDAP server with the tree `dc=borealis,dc=test`.
#[derive(Debug)]
pub struct Slapd {
    /// Its port for plain LDAP and StartTLS.
    pub port: u16,
    /// Its port for LDAPS.
    pub tls_port: u16,
    /// What it shows.
    pub certificates: Certificates,
    server: Child,
    folder: tempfile::TempDir,
}

impl Slapd {
    /// The name its certificate is for.
    pub const NAME: &str = "ldap.borealis.test";
    /// Where people and groups are.
    pub const BASE: &str = "dc=borealis,dc=test";
    /// The account the engine binds with.
    pub const READER: &str = "cn=reader,dc=borealis,dc=test";
    /// One that may read more than 500 entries, in pages; its password is the other's.
    pub const PAGER: &str = "cn=pager,dc=borealis,dc=test";
    const ROOT: &str = "cn=root,dc=borealis,dc=test";

    /// Starts one with this tree beneath the base, as LDIF.
    pub async fn start(processes: &mut Processes, tree: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-slapd-").tempdir().expect("a folder");
        let certificates = Certificates::for_name(Self::NAME);
        certificates.write(folder.path());
        let at = folder.path().display();
        std::fs::create_dir(folder.path().join("data")).expect("a folder");
        let configuration = format!(
            "include /etc/ldap/schema/core.schema\n\
             include /etc/ldap/schema/cosine.schema\n\
             include /etc/ldap/schema/inetorgperson.schema\n\
             include /etc/ldap/schema/nis.schema\n\
             modulepath /usr/lib/ldap\n\
             moduleload back_mdb\n\
             moduleload memberof\n\
             TLSCACertificateFile {at}/authority.pem\n\
             TLSCertificateFile {at}/server.pem\n\
             TLSCertificateKeyFile {at}/key.pem\n\
             database mdb\n\
             maxsize 67108864\n\
             suffix \"{base}\"\n\
             rootdn \"{root}\"\n\
             rootpw \"{ROOT_PASSWORD}\"\n\
             sizelimit 500\n\
             limits dn.exact=\"{pager}\" size.prtotal=unlimited\n\
             directory {at}/data\n\
             overlay memberof\n\
             access to attrs=userPassword by anonymous auth by * none\n\
             access to * by users read by * none\n",
            base = Self::BASE,
            root = Self::ROOT,
            pager = Self::PAGER,
        );
        let file = folder.path().join("slapd.conf");
        std::fs::write(&file, configuration).expect("a file");
        let (port, tls_port) = (free_port(), free_port());
        let slapd = Self { port, tls_port, certificates, server: run(processes, &file, port, tls_port), folder };
        slapd.ready().await;
        slapd.modify(&format!(
            "dn: {base}\nchangetype: add\nobjectClass: dcObject\nobjectClass: organization\no: Borealis\ndc: borealis\n\n\
             dn: {reader}\nchangetype: add\nobjectClass: person\ncn: reader\nsn: reader\nuserPassword: {READER_PASSWORD}\n\n\
             dn: {pager}\nchangetype: add\nobjectClass: person\ncn: pager\nsn: pager\nuserPassword: {READER_PASSWORD}\n\n{tree}",
            base = Self::BASE,
            reader = Self::READER,
            pager = Self::PAGER,
        ));
        slapd
    }

    async fn ready(&self) {
        listens(("127.0.0.1", self.tls_port)).await;
    }

    /// Stops it.
    pub fn stop(&mut self) {
        self.server.kill_now();
    }

    /// Starts it again after [`Self::stop`].
    pub async fn start_again(&mut self, processes: &mut Processes) {
        self.server = run(processes, &self.folder.path().join("slapd.conf"), self.port, self.tls_port);
        self.ready().await;
    }

    /// Changes the tree, as LDIF with a `changetype` in every record.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn modify(&self, ldif: &str) {
        let mut child = Command::new("ldapmodify")
            .args(["-x", "-H", &format!("ldap://127.0.0.1:{}", self.port), "-D", Self::ROOT, "-w", ROOT_PASSWORD])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ldapmodify");
        child.stdin.take().expect("its input").write_all(ldif.as_bytes()).expect("LDIF");
        let output = child.wait_with_output().expect("ldapmodify");
        assert!(output.status.success(), "{}\n{ldif}", String::from_utf8_lossy(&output.stderr));
    }
}

fn run(processes: &mut Processes, file: &Path, port: u16, tls_port: u16) -> Child {
    let file = file.display().to_string();
    let urls = format!("ldap://127.0.0.1:{port} ldaps://127.0.0.1:{tls_port}");
    processes.start_program("/usr/sbin/slapd".as_ref(), &["-f", &file, "-h", &urls, "-d", "0"])
}

/// A person of an LDIF tree.
#[must_use]
pub fn person(uid: &str, name: &str, password: &str) -> String {
    let base = Slapd::BASE;
    format!(
        "dn: uid={uid},ou=people,{base}\nchangetype: add\nobjectClass: inetOrgPerson\nuid: {uid}\ncn: {name}\nsn: {name}\n\
         displayName: {name}\nmail: {uid}@borealis.test\nuserPassword: {password}\n\n"
    )
}

/// A group of an LDIF tree, with its members.
#[must_use]
pub fn group(cn: &str, members: &[&str]) -> String {
    let base = Slapd::BASE;
    let members: String = members.iter().map(|member| format!("member: {member},{base}\n")).collect();
    format!("dn: cn={cn},ou=groups,{base}\nchangetype: add\nobjectClass: groupOfNames\ncn: {cn}\n{members}\n")
}

/// A domain controller of the realm `AD.BOREALIS.TEST`, reachable at an address of its own. Needs root.
#[derive(Debug)]
pub struct DomainController {
    /// Where it is.
    pub address: Ipv4Addr,
    /// What it shows.
    pub certificates: Certificates,
    server: Child,
    configuration: PathBuf,
    _folder: tempfile::TempDir,
    namespace: String,
}

impl DomainController {
    /// The name its certificate is for.
    pub const NAME: &str = "dc1.ad.borealis.test";
    /// Where people and groups are.
    pub const BASE: &str = "DC=ad,DC=borealis,DC=test";
    /// The administrator.
    pub const ADMINISTRATOR: &str = "Administrator@ad.borealis.test";

    /// Makes the domain and starts it.
    ///
    /// # Panics
    /// When Samba is not installed, or this is not run by root.
    pub async fn start(processes: &mut Processes) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-samba-").tempdir().expect("a folder");
        let certificates = Certificates::for_name(Self::NAME);
        certificates.write(folder.path());
        let number = u8::try_from(std::process::id() % 200).expect("a small number");
        let address = Ipv4Addr::new(10, 77, 20 + number, 2);
        let namespace = format!("borealis-{}", std::process::id());
        let (near, gateway) = (format!("bad{}", std::process::id()), Ipv4Addr::new(10, 77, 20 + number, 1));
        for line in [
            format!("ip netns add {namespace}"),
            format!("ip link add {near} type veth peer name eth0 netns {namespace}"),
            format!("ip addr add {gateway}/24 dev {near}"),
            format!("ip link set {near} up"),
            format!("ip -n {namespace} addr add {address}/24 dev eth0"),
            format!("ip -n {namespace} link set eth0 up"),
            format!("ip -n {namespace} link set lo up"),
        ] {
            command(&line.split(' ').collect::<Vec<_>>());
        }
        let at = folder.path().join("dc");
        command(&[
            "samba-tool",
            "domain",
            "provision",
            &format!("--targetdir={}", at.display()),
            "--realm=AD.BOREALIS.TEST",
            "--domain=BOREALIS",
            "--server-role=dc",
            "--dns-backend=NONE",
            &format!("--adminpass={ROOT_PASSWORD}-1A"),
            "--host-name=dc1",
            "--host-ip=127.0.0.1",
            "--option=bind interfaces only=yes",
            "--option=interfaces=lo",
        ]);
        let configuration = at.join("etc/smb.conf");
        let made = std::fs::read_to_string(&configuration).expect("smb.conf");
        let (folder_text, at_text) = (folder.path().display(), at.display());
        let ours = format!(
            "interfaces = lo eth0\n\tserver services = ldap, cldap, kdc, winbindd\n\tlog file = {at_text}/log.%m\n\
             \tpid directory = {at_text}\n\tncalrpc dir = {at_text}/ncalrpc\n\ttls enabled = yes\n\
             \ttls keyfile = {folder_text}/key.pem\n\ttls certfile = {folder_text}/server.pem\n\ttls cafile = {folder_text}/authority.pem"
        );
        let lines: Vec<String> = made
            .lines()
            .filter(|line| !["log file", "server services"].iter().any(|name| line.trim_start().starts_with(name)))
            .map(|line| if line.trim() == "interfaces = lo" { format!("\t{ours}") } else { line.to_owned() })
            .collect();
        std::fs::write(&configuration, lines.join("\n")).expect("smb.conf");
        let file = configuration.display().to_string();
        let arguments = ["netns", "exec", &namespace, "samba", "-F", "--no-process-group", "-s", &file, "--debug-stdout"];
        let server = processes.start_program("ip".as_ref(), &arguments);
        listens((address, 636)).await;
        Self { address, certificates, server, configuration, _folder: folder, namespace }
    }

    /// The administrator's password.
    #[must_use]
    pub fn administrator_password() -> String {
        format!("{ROOT_PASSWORD}-1A")
    }

    /// Runs `samba-tool` with these arguments on the domain.
    ///
    /// # Panics
    /// When it refuses.
    pub fn tool(&self, arguments: &[&str]) {
        let file = self.configuration.display().to_string();
        let line: Vec<&str> = ["samba-tool"].iter().chain(arguments).copied().chain(["-s", &file]).collect();
        command(&line);
    }
}

impl Drop for DomainController {
    fn drop(&mut self) {
        // In good order: killed, it would leave its children.
        self.server.ask_to_end();
        for _ in 0..100 {
            if !self.server.is_running() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}

fn command(line: &[&str]) {
    let output = Command::new(line[0]).args(&line[1..]).output().unwrap_or_else(|error| panic!("{line:?}: {error}"));
    let said = || format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{line:?}: {}", said());
}
