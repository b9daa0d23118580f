//! Where the engine may connect to when somebody else has chosen the target: one policy for directories, certificate
//! downloads, GitHub and everything like them.
//!
//! A name is resolved once and the connection goes to the address that was looked at, so that a name server cannot change
//! its mind in between. Loopback, link-local, metadata services and everything else that is no unicast host are refused,
//! whatever they are wrapped in; private networks are open to the purposes that are about them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

use crate::error::{Error, Kind, Result};

/// How long resolving and connecting may take together.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What a connection is for.
#[derive(Debug, Clone, Copy)]
pub struct Purpose {
    /// Its name, for messages.
    pub name: &'static str,
    /// The ports it uses.
    pub ports: &'static [u16],
    /// Whether it may go into private networks.
    pub private: bool,
}

/// LDAP and Active Directory, with their global catalogs.
pub const DIRECTORY: Purpose = Purpose { name: "a directory", ports: &[389, 636, 3268, 3269], private: true };

/// An exception an administrator of the machine has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exception {
    net: IpNet,
    port: Option<u16>,
}

impl Exception {
    fn covers(&self, address: SocketAddr) -> bool {
        self.net.contains(&address.ip()) && self.port.is_none_or(|port| port == address.port())
    }
}

/// The policy: rules, the exceptions of this installation, and the engine's own doors, which no exception opens.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    exceptions: Vec<Exception>,
    own: Vec<(String, u16)>,
}

impl std::fmt::Display for Policy {
    /// The exceptions, as [`FromStr`] reads them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, Exception { net, port }) in self.exceptions.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            match port {
                Some(port) => write!(f, "{comma}[{net}]:{port}")?,
                None => write!(f, "{comma}{net}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Policy {
    type Err = String;

    /// Reads exceptions: networks or addresses, each with or without a port, separated by commas:
    /// `10.0.0.5:3890, 192.0.2.0/24, [::1]:6360`.
    fn from_str(text: &str) -> Result<Self, String> {
        let exceptions =
            text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(exception).collect::<Result<_, _>>()?;
        Ok(Self { exceptions, own: Vec::new() })
    }
}

/// Names the implementation of TLS that libraries of this process are to use. To be called before an HTTP client is made; to be called
/// again is as good.
pub fn provide_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A network, or an address as the network of itself: `10.0.0.0/8`, `10.0.0.5`, `[::1]`.
#[must_use]
pub fn network(text: &str) -> Option<IpNet> {
    let text = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn exception(text: &str) -> Result<Exception, String> {
    if let Some(net) = network(text) {
        return Ok(Exception { net, port: None });
    }
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((network(host)?, port.parse::<u16>().ok()?)));
    let (net, port) = parts.ok_or_else(|| format!("{text} is neither an address nor a network, with or without a port"))?;
    Ok(Exception { net, port: Some(port) })
}

/// What kind of address it is, from the view of somebody who must not reach the inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Public,
    Private,
    Forbidden,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const FORBIDDEN_V4: [Ipv4Net; 8] = [
    v4(0, 0, 0, 0, 8),
    v4(127, 0, 0, 0, 8),
    // Link-local, where clouds have their metadata.
    v4(169, 254, 0, 0, 16),
    // Protocol assignments; Oracle's metadata among them.
    v4(192, 0, 0, 0, 24),
    // 6to4 relays.
    v4(192, 88, 99, 0, 24),
    // Metadata of Alibaba's cloud, inside the shared range.
    v4(100, 100, 100, 200, 32),
    // Multicast, reserved, broadcast.
    v4(224, 0, 0, 0, 4),
    v4(240, 0, 0, 0, 4),
];

const PRIVATE_V4: [Ipv4Net; 5] =
    [v4(10, 0, 0, 0, 8), v4(172, 16, 0, 0, 12), v4(192, 168, 0, 0, 16), v4(100, 64, 0, 0, 10), v4(198, 18, 0, 0, 15)];

/// The only addresses of version 6 that are hosts of the public network.
const GLOBAL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// Those of them that wrap an address of version 4: 6to4 and Teredo.
const WRAPPING_V6: [Ipv6Net; 2] = [
    Ipv6Net::new_assert(Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32),
];
const PRIVATE_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);
/// Metadata of Amazon's cloud, inside the private range.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

fn reach(ip: IpAddr) -> Reach {
    match ip.to_canonical() {
        IpAddr::V4(ip) if FORBIDDEN_V4.iter().any(|net| net.contains(&ip)) => Reach::Forbidden,
        IpAddr::V4(ip) if PRIVATE_V4.iter().any(|net| net.contains(&ip)) => Reach::Private,
        IpAddr::V4(_) => Reach::Public,
        IpAddr::V6(ip) if ip == METADATA_V6 => Reach::Forbidden,
        IpAddr::V6(ip) if PRIVATE_V6.contains(&ip) => Reach::Private,
        IpAddr::V6(ip) if GLOBAL_V6.contains(&ip) && !WRAPPING_V6.iter().any(|net| net.contains(&ip)) => Reach::Public,
        IpAddr::V6(_) => Reach::Forbidden,
    }
}

fn refused(purpose: Purpose, why: &str) -> Error {
    Error::new(Kind::Forbidden, "egress_refused", format!("The engine may not connect there for {}: {why}.", purpose.name))
}

fn unreachable(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    let mut error = Error::new(Kind::Upstream, "unreachable", "The server cannot be reached.");
    error.source = Some(why.into());
    error
}

/// Whether this machine has the address: only then can something be bound to it.
fn is_of_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || std::net::UdpSocket::bind((ip, 0)).is_ok()
}

impl Policy {
    /// The same policy, and a door of the engine itself (a listener, the database), that stays closed whatever is excepted.
    #[must_use]
    pub fn closed(mut self, host: impl Into<String>, port: u16) -> Self {
        self.own.push((host.into(), port));
        self
    }

    fn may(&self, purpose: Purpose, address: SocketAddr) -> Result<()> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if self.exceptions.iter().any(|exception| exception.covers(address)) {
            return Ok(());
        }
        if !purpose.ports.contains(&address.port()) {
            return Err(refused(purpose, &format!("port {} is not one of its ports", address.port())));
        }
        match reach(address.ip()) {
            Reach::Public => Ok(()),
            Reach::Private if purpose.private => Ok(()),
            Reach::Private => Err(refused(purpose, "the address is in a private network")),
            Reach::Forbidden => Err(refused(purpose, "the address is not that of a host outside")),
        }
    }

    /// Whether it is one of the engine's own doors.
    async fn is_own(&self, address: SocketAddr) -> bool {
        for (host, port) in &self.own {
            if *port != address.port() {
                continue;
            }
            let resolved: Vec<IpAddr> = match lookup_host((host.as_str(), *port)).await {
                Ok(found) => found.map(|found| found.ip().to_canonical()).collect(),
                Err(_) => Vec::new(),
            };
            let ip = address.ip().to_canonical();
            // A listener on every address is behind every one of this machine.
            let everywhere = resolved.iter().any(IpAddr::is_unspecified);
            if resolved.contains(&ip) || everywhere && is_of_this_machine(ip) {
                return true;
            }
        }
        false
    }

    /// The addresses of `host` that may be connected to, for a client that takes addresses instead of a name.
    ///
    /// # Errors
    /// 403 `egress_refused` when the policy closes every address of it; 502 `unreachable` when it cannot be resolved.
    pub async fn addresses(&self, purpose: Purpose, host: &str, port: u16) -> Result<Vec<SocketAddr>> {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let resolved = timeout(CONNECT_LIMIT, lookup_host((host, port))).await;
        let resolved = resolved.unwrap_or_else(|elapsed| Err(elapsed.into())).map_err(unreachable)?;
        self.open(purpose, resolved.collect()).await
    }

    /// Those of the addresses that the policy leaves open.
    async fn open(&self, purpose: Purpose, addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>> {
        let mut last = unreachable("the name has no address");
        let mut open = Vec::with_capacity(addresses.len());
        for address in addresses {
            if let Err(error) = self.may(purpose, address) {
                last = error;
            } else if self.is_own(address).await {
                last = refused(purpose, "it is a door of the engine itself");
            } else {
                open.push(address);
            }
        }
        if open.is_empty() { Err(last) } else { Ok(open) }
    }

    /// Connects to `host`, or to `pinned` in its place.
    ///
    /// # Errors
    /// As [`Policy::addresses`]; 502 `unreachable` when none of them answers within [`CONNECT_LIMIT`].
    pub async fn connect(&self, purpose: Purpose, host: &str, port: u16, pinned: Option<IpAddr>) -> Result<TcpStream> {
        let attempt = async {
            let addresses = match pinned {
                Some(ip) => self.open(purpose, vec![SocketAddr::new(ip, port)]).await?,
                None => self.addresses(purpose, host, port).await?,
            };
            let mut last = unreachable("no address");
            for address in addresses {
                match TcpStream::connect(address).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = unreachable(error),
                }
            }
            Err(last)
        };
        timeout(CONNECT_LIMIT, attempt).await.unwrap_or_else(|_| Err(unreachable("no answer in time")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTSIDE: Purpose = Purpose { name: "a test", ports: &[443], private: false };

    fn may(policy: &Policy, purpose: Purpose, address: &str) -> bool {
        policy.may(purpose, address.parse().unwrap()).is_ok()
    }

    #[test]
    fn hostile_targets_are_refused() {
        let policy = Policy::default();
        for ip in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.1.1.1",
            "127.255.255.255",
            "169.254.0.1",
            "169.254.169.254",
            "169.254.170.2",
            "192.0.0.192",
            "192.88.99.1",
            "100.100.100.200",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            for text in
                [format!("{ip}:389"), format!("[::ffff:{ip}]:389"), format!("[::{ip}]:389"), format!("[64:ff9b::{ip}]:389")]
            {
                assert!(!may(&policy, DIRECTORY, &text), "{text}");
            }
        }
        for ip in [
            "::",
            "::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "2001::1",
            "64:ff9b:1::1",
            "100::1",
            "::ffff:0:127.0.0.1",
        ] {
            assert!(!may(&policy, DIRECTORY, &format!("[{ip}]:389")), "{ip}");
        }
        for port in [22, 80, 443, 5432, 6379, 8080] {
            assert!(!may(&policy, DIRECTORY, &format!("10.0.0.1:{port}")), "{port}");
        }
    }

    #[test]
    fn private_networks_are_for_purposes_about_them() {
        let policy = Policy::default();
        for ip in ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1", "[fd12::1]", "[::ffff:10.0.0.1]"] {
            assert!(may(&policy, DIRECTORY, &format!("{ip}:636")), "{ip}");
            assert!(!may(&policy, OUTSIDE, &format!("{ip}:443")), "{ip}");
        }
        for ip in ["8.8.8.8", "172.32.0.1", "[2606:4700::1111]"] {
            assert!(may(&policy, OUTSIDE, &format!("{ip}:443")), "{ip}");
        }
    }

    #[test]
    fn exceptions_open_addresses_and_ports() {
        let policy: Policy = "127.0.0.0/8:3890, 10.0.0.5, [::1]:6360, fd12::/16".parse().unwrap();
        let policy: Policy = policy.to_string().parse().unwrap();
        for open in ["127.0.0.1:3890", "[::ffff:127.0.0.1]:3890", "10.0.0.5:9999", "[::1]:6360", "[fd12::1]:1"] {
            assert!(may(&policy, DIRECTORY, open), "{open}");
        }
        for closed in ["127.0.0.1:389", "10.0.0.6:9999", "[::1]:389"] {
            assert!(!may(&policy, DIRECTORY, closed), "{closed}");
        }
        for bad in ["localhost", "10.0.0.0/33", "10.0.0.1:http", "10.0.0.1:99999"] {
            assert!(bad.parse::<Policy>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_own_doors_stay_closed() {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let open: Policy = "127.0.0.0/8".parse().unwrap();
        assert!(open.connect(DIRECTORY, "127.0.0.1", port, None).await.is_ok());
        assert!(open.connect(DIRECTORY, "nowhere.invalid", port, "127.0.0.1".parse().ok()).await.is_ok());
        for own in ["127.0.0.1", "0.0.0.0"] {
            let closed = open.clone().closed(own, port);
            assert_eq!(closed.connect(DIRECTORY, "127.0.0.1", port, None).await.unwrap_err().code, "egress_refused", "{own}");
        }
        // Another address of this machine, where it has one.
        let way = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect("192.0.2.1:9").map(|()| socket));
        if let Ok(own) = way.and_then(|socket| socket.local_addr()) {
            let listens = open.clone().closed("0.0.0.0", 389);
            assert!(listens.is_own(SocketAddr::new(own.ip(), 389)).await, "{own}");
            assert!(!listens.is_own(SocketAddr::new(own.ip(), 636)).await, "{own}");
        }
        assert!(!open.clone().closed("0.0.0.0", 389).is_own("203.0.113.9:389".parse().unwrap()).await);
        let nobody = open.connect(DIRECTORY, "nowhere.invalid", port, None).await.unwrap_err();
        assert_eq!(nobody.code, "unreachable");
    }
}
