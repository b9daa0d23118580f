//! The units of engine and agent under a real systemd, in a container on a layer above this machine's files. The one of
//! docs/operations.md starts the engine and stops it in order; the agent installs and removes its own. As root only, for a container
//! needs that.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use borealis_tests::{eventually, processes::built};
use nix::unistd::Uid;

const SOON: Duration = Duration::from_secs(60);

/// The unit as the page has it.
fn documented() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, unit) = page.split_once("```systemd\n").expect("a unit in the page");
    unit.split_once("```").expect("its end").0.to_owned()
}

#[test]
fn the_documented_unit_is_one() {
    let unit = documented();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("borealis.service");
    std::fs::write(&file, unit.replace("/opt/borealis/borealis-api", built("borealis-api").to_str().unwrap())).unwrap();
    let checked = Command::new("systemd-analyze").arg("verify").arg(&file).output().expect("systemd-analyze");
    let said = String::from_utf8_lossy(&checked.stderr);
    let about: Vec<&str> = said.lines().filter(|line| line.contains("borealis.service")).collect();
    assert!(checked.status.success() && about.is_empty(), "{said}");
}

/// A machine that runs nothing but systemd. Dropping it ends it.
struct Machine {
    nspawn: Child,
    leader: String,
    root: PathBuf,
    layer: PathBuf,
    _folder: tempfile::TempDir,
}

fn shell(script: &str, arguments: &[&Path]) {
    let done = Command::new("sh").args(["-euc", script, "sh"]).args(arguments).output().expect("a shell");
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

impl Machine {
    async fn start(prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-machine-").tempdir().unwrap();
        let (layer, root) = (folder.path().join("layer"), folder.path().join("root"));
        shell(
            "mkdir \"$1\" \"$2\"; mount -t tmpfs -o mode=755 tmpfs \"$1\"; mkdir \"$1/upper\" \"$1/work\"; \
             mount -t overlay overlay -o \"lowerdir=/,upperdir=$1/upper,workdir=$1/work\" \"$2\"; : >\"$2/etc/machine-id\"; \
             rm -rf \"$2\"/etc/systemd/system/*.wants",
            &[&layer, &root],
        );
        let target = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n";
        std::fs::write(root.join("etc/systemd/system/bare.target"), target).unwrap();
        prepare(&root);
        let console = std::fs::File::create(folder.path().join("console")).unwrap();
        let nspawn = Command::new("systemd-nspawn")
            .args(["-q", "--register=no", "--keep-unit", "--private-network", "-b", "-D"])
            .arg(&root)
            .arg("systemd.unit=bare.target")
            .stdin(Stdio::null())
            .stdout(console.try_clone().unwrap())
            .stderr(console)
            .spawn()
            .expect("systemd-nspawn (package systemd-container)");
        let mut machine = Self { nspawn, leader: String::new(), root, layer, _folder: folder };
        let children = format!("/proc/{0}/task/{0}/children", machine.nspawn.id());
        let until = tokio::time::Instant::now() + SOON;
        while machine.leader.is_empty() || !machine.run(&["systemctl", "is-active", "basic.target"]).status.success() {
            assert!(tokio::time::Instant::now() < until, "systemd has not started");
            tokio::time::sleep(Duration::from_millis(50)).await;
            // The first child only makes the namespaces, and ends.
            let children = std::fs::read_to_string(&children).unwrap_or_default();
            machine.leader = children.split_whitespace().next().unwrap_or_default().to_owned();
        }
        machine
    }

    /// Runs a program in it.
    fn run(&self, line: &[&str]) -> Output {
        let enter = ["-t", &self.leader, "-m", "-p", "-u", "-i", "-n", "--"];
        Command::new("nsenter").args(enter).args(line).stdin(Stdio::null()).output().expect("nsenter")
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.leader.is_empty() {
            // How systemd is told to halt at once.
            let _ = Command::new("kill").args(["-s", "RTMIN+4", &self.leader]).status();
            for _ in 0..200 {
                if !matches!(self.nspawn.try_wait(), Ok(None)) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let _ = self.nspawn.kill();
        let _ = self.nspawn.wait();
        let _ = Command::new("umount").arg(&self.root).arg(&self.layer).status();
    }
}

#[tokio::test]
async fn the_documented_unit_stops_the_engine_in_order() {
    if !Uid::effective().is_root() {
        return;
    }
    let machine = Machine::start(|root| {
        let programs = root.join("opt/borealis");
        std::fs::create_dir_all(&programs).unwrap();
        for name in ["borealis-api", "borealis-worker"] {
            std::fs::copy(built(name), programs.join(name)).unwrap();
            std::fs::set_permissions(programs.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let units = root.join("etc/systemd/system");
        std::fs::write(units.join("borealis.service"), documented()).unwrap();
        // Where the test can read it.
        std::fs::create_dir(units.join("borealis.service.d")).unwrap();
        let log = "[Service]\nStandardOutput=append:/var/log/borealis.log\nStandardError=append:/var/log/borealis.log\n";
        std::fs::write(units.join("borealis.service.d/log.conf"), log).unwrap();
    })
    .await;
    let said = || machine.read("var/log/borealis.log");
    let started = machine.run(&["systemctl", "start", "borealis"]);
    assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    eventually("the engine is up", SOON, async || {
        assert!(!said().contains("because"), "{}", said());
        said().contains("the engine is up").then_some(())
    })
    .await;

    let stopped = machine.run(&["systemctl", "stop", "borealis"]);
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
    let result = machine.run(&["systemctl", "show", "borealis", "-p", "Result", "-p", "ExecMainStatus"]);
    let result = String::from_utf8_lossy(&result.stdout).into_owned();
    assert!(result.contains("Result=success") && result.contains("ExecMainStatus=0"), "{result}\n{}", said());
    // The supervisor alone was told: everything else ended when its turn came, Postgres last and asked by the supervisor.
    let log = said();
    assert!(log.contains("stopping Postgres") && !log.contains("a process ended") && !log.contains("postgres ended"), "{log}");
    let postgres = machine.read("var/lib/borealis/state/logs/postgres.log");
    assert!(postgres.contains("received fast shutdown request") && !postgres.contains("smart shutdown"), "{postgres}");
    assert!(postgres.contains("database system is shut down"), "{postgres}");
    // Nobody was connected any more.
    assert!(!postgres.contains("terminating connection"), "{postgres}");
}

#[tokio::test]
async fn the_agent_is_installed_replaced_and_removed_and_what_it_started_stays() {
    if !Uid::effective().is_root() {
        return;
    }
    let machine = Machine::start(|root| {
        for (folder, mode) in [("root/new", 0o755), ("opt/open", 0o777)] {
            let folder = root.join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).unwrap();
            std::fs::copy(built("borealis-agent"), folder.join("borealis-agent")).unwrap();
            std::fs::set_permissions(folder.join("borealis-agent"), std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    })
    .await;
    let text = |output: &Output| [output.stdout.as_slice(), &output.stderr].map(String::from_utf8_lossy).concat();
    let ok = |line: &[&str]| {
        let output = machine.run(line);
        assert!(output.status.success(), "{line:?}: {}", text(&output));
        text(&output)
    };
    // What others could have put there does not become a service of root's.
    let refused = machine.run(&["/opt/open/borealis-agent", "install", "--server-url", "http://127.0.0.1:9"]);
    assert!(!refused.status.success() && text(&refused).contains("others may write to /opt/open"), "{}", text(&refused));
    assert!(!machine.root.join("etc/borealis-agent").exists());

    let new = "/root/new/borealis-agent";
    let _ = ok(&[new, "install", "--server-url", "http://127.0.0.1:9", "--enrollment-code", "nobody-hears-it"]);
    let levels = "journalctl -u borealis-agent -o json | grep -o '\"PRIORITY\":\"4\"'";
    eventually("a warning is one in the journal", SOON, async || {
        machine.run(&["sh", "-c", levels]).status.success().then_some(())
    })
    .await;
    // A daemon among the processes of the service, as a script leaves it.
    let daemon = "setsid sleep 600 >/dev/null 2>&1 & echo $! >/run/daemon; \
                  echo $! >\"$(find /sys/fs/cgroup -path '*borealis-agent.service/cgroup.procs' | head -n 1)\"; \
                  grep -q borealis-agent.service /proc/$!/cgroup";
    let _ = ok(&["sh", "-ec", daemon]);
    // The same program again, over the one that runs.
    let _ = ok(&[new, "install"]);
    let _ = ok(&["systemctl", "is-active", "borealis-agent"]);
    let _ = ok(&["sh", "-c", "kill -0 $(cat /run/daemon)"]);

    let _ = ok(&["/usr/local/bin/borealis-agent", "uninstall", "--purge"]);
    let _ = ok(&["sh", "-c", "kill $(cat /run/daemon)"]);
    let left = machine.run(&["find", "/etc", "/var/lib", "/usr/local", "/run", "-name", "*borealis-agent*"]);
    assert_eq!(String::from_utf8_lossy(&left.stdout), "", "nothing is left");
}
