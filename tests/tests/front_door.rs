//! `./borealis`: every verb explains itself, and what is missing on a machine is named with the way to get it on that machine.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use borealis_tests::eventually;
use nix::unistd::Uid;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("borealis")
}

fn run(arguments: &[&str]) -> Output {
    Command::new(script()).args(arguments).stdin(Stdio::null()).output().expect("a shell")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A folder with all programs of the system but some.
fn programs_without(missing: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for from in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if !missing.iter().any(|missing| *missing == name) {
                let _ = symlink(entry.path(), folder.path().join(name));
            }
        }
    }
    // Where cargo is, when the system's folders do not have it.
    let path = std::env::var("PATH").unwrap_or_default();
    for program in ["cargo", "rustc"] {
        if missing.contains(&program) || folder.path().join(program).exists() {
            continue;
        }
        let found = path.split(':').map(|folder| Path::new(folder).join(program)).find(|file| file.exists());
        symlink(found.unwrap_or_else(|| panic!("no {program}")), folder.path().join(program)).unwrap();
    }
    folder
}

#[test]
fn every_verb_explains_itself() {
    for verb in ["demo", "up", "test", "lint", "doctor", "prepare"] {
        for help in ["--help", "-h"] {
            let output = run(&[verb, help]);
            assert!(output.status.success(), "{verb}: {}", text(&output));
            assert!(
                String::from_utf8_lossy(&output.stdout).starts_with(&format!("usage: ./borealis {verb}")),
                "{}",
                text(&output)
            );
        }
    }
    for arguments in [&["doctor", "x"][..], &["up", "now"], &["lint", "x"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains("takes no arguments"), "{}", text(&output));
    }
    assert_eq!(run(&["upp"]).status.code(), Some(2));
}

#[test]
fn a_rust_that_is_too_old_is_named() {
    let programs = programs_without(&["rustc"]);
    std::fs::write(programs.path().join("rustc"), "#!/bin/sh\necho 'rustc 1.85.1 (4eb161250 2025-03-15)'\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(programs.path().join("rustc"), executable).unwrap();
    for verb in ["doctor", "lint"] {
        let output = Command::new(script()).arg(verb).env("PATH", programs.path()).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains("Rust is 1.85.1, and 1.95 or newer is needed"), "{}", text(&output));
    }
}

#[test]
fn what_is_typed_as_root_fits_the_machine() {
    if !Uid::effective().is_root() {
        return;
    }
    let sudo = "#!/bin/sh\nexit 1\n";
    for (with_sudo, expected) in [(true, "sudo sh -c 'apt-get update"), (false, "su -c 'apt-get update")] {
        let programs = programs_without(&["shellcheck", "sudo"]);
        std::fs::set_permissions(programs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        if with_sudo {
            // One that asks for a password.
            std::fs::write(programs.path().join("sudo"), sudo).unwrap();
            std::fs::set_permissions(programs.path().join("sudo"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        // The checkout may be closed to others.
        let copy = programs.path().join("checkout");
        std::fs::create_dir(&copy).unwrap();
        for file in ["borealis", "Cargo.toml"] {
            std::fs::copy(script().with_file_name(file), copy.join(file)).unwrap();
        }
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "checkout/borealis", "doctor"])
            .env("PATH", programs.path())
            .current_dir(programs.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = text(&output);
        let line = said.lines().find(|line| line.contains("packages for lint")).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains(expected), "{line}");
    }
}

/// A new machine updates itself in its first minutes: apt's lock is taken then.
#[tokio::test]
async fn a_busy_package_system_is_waited_for() {
    let programs = programs_without(&["shellcheck"]);
    // A package system of its own, without any packages, and a folder of its own for what stops servers from starting.
    let apt = tempfile::tempdir().unwrap();
    for folder in ["lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d", "etc/sources.list.d"] {
        std::fs::create_dir_all(apt.path().join(folder)).unwrap();
    }
    for file in ["status", "etc/sources.list"] {
        std::fs::write(apt.path().join(file), "").unwrap();
    }
    let root = apt.path().display();
    std::fs::write(
        apt.path().join("apt.conf"),
        format!(
            "Dir::State \"{root}\"; Dir::State::lists \"{root}/lists\"; Dir::State::status \"{root}/status\"; Dir::Cache \"{root}/cache\"; \
             Dir::Etc \"{root}/etc\"; APT::Sandbox::User \"root\";\n"
        ),
    )
    .unwrap();
    let held = std::fs::File::create(apt.path().join("lists/lock")).unwrap();
    let whole = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&held, nix::fcntl::FcntlArg::F_SETLK(&whole)).expect("the lock");

    let namespace = if Uid::effective().is_root() { "-m" } else { "-Urm" };
    let inside = format!("mount -t tmpfs tmpfs /usr/sbin && PATH={} exec {} lint", programs.path().display(), script().display());
    let said = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new("unshare")
        .args([namespace, "sh", "-c", &inside])
        .env("APT_CONFIG", apt.path().join("apt.conf"))
        .stdin(Stdio::null())
        .stdout(said.reopen().unwrap())
        .stderr(std::fs::File::options().append(true).open(said.path()).unwrap())
        .spawn()
        .unwrap();
    let read = || std::fs::read_to_string(said.path()).unwrap();
    eventually("it says what it waits for", Duration::from_secs(30), async || {
        let text = read();
        assert!(!text.contains("could not be installed"), "{text}");
        text.contains("another program is installing").then_some(())
    })
    .await;
    assert!(child.try_wait().unwrap().is_none(), "{}", read());
    drop(held);
    // With the lock it goes on, and finds that there are no packages here.
    let status = eventually("it goes on", Duration::from_secs(30), || std::future::ready(child.try_wait().unwrap())).await;
    let text = read();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("Unable to locate package shellcheck"), "{text}");
}
