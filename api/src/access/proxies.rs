//! Whom a request really comes from, where proxies that are known pass it on.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use borealis_engine::egress;
use ipnet::IpNet;

/// The proxies whose `X-Forwarded-For` is believed: `127.0.0.1,10.1.0.0/16`. Nobody's unless they are named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<IpNet>);

impl std::fmt::Display for TrustedProxies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let networks: Vec<String> = self.0.iter().map(IpNet::to_string).collect();
        f.write_str(&networks.join(","))
    }
}

impl FromStr for TrustedProxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = |entry: &str| egress::network(entry).ok_or_else(|| format!("{entry} is neither an address nor a network"));
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        Ok(Self(entries.map(network).collect::<Result<_, _>>()?))
    }
}

impl TrustedProxies {
    /// Whether it is one of them.
    #[must_use]
    pub fn trusts(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&ip))
    }

    /// The client's address: the peer's, or, as long as that is a known proxy, what it has added to `forwarded`, the values of
    /// `X-Forwarded-For` in their order. What stands left of that may be anybody's invention, and so may all of it when the peer is not
    /// known. Where all are known proxies it is the first of them.
    #[must_use]
    pub fn client<'a>(&self, peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'a str>) -> IpAddr {
        let mut client = peer.to_canonical();
        for entry in forwarded.rev().flat_map(|value| value.rsplit(',')) {
            if !self.trusts(client) {
                break;
            }
            // What cannot be read was not added by a proxy that knows whom it speaks to.
            let Some(before) = address(entry.trim()) else { break };
            client = before;
        }
        client
    }
}

/// An entry of the header: an address, some proxies add the port.
fn address(entry: &str) -> Option<IpAddr> {
    let ip = entry.parse::<IpAddr>().ok();
    let ip = ip.or_else(|| entry.parse::<SocketAddr>().ok().map(|at| at.ip()));
    let ip = ip.or_else(|| entry.strip_prefix('[')?.strip_suffix(']')?.parse().ok())?;
    Some(ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(trusted: &str, peer: &str, forwarded: &[&str]) -> String {
        let trusted: TrustedProxies = trusted.parse().unwrap();
        trusted.client(peer.parse().unwrap(), forwarded.iter().copied()).to_string()
    }

    #[test]
    fn nobody_is_believed_who_is_not_named() {
        assert_eq!(client("", "127.0.0.1", &["203.0.113.5"]), "127.0.0.1");
        assert_eq!(client("10.0.0.0/8", "127.0.0.1", &["203.0.113.5"]), "127.0.0.1");
        assert_eq!(client("127.0.0.1", "127.0.0.1", &[]), "127.0.0.1");
    }

    #[test]
    fn the_hop_that_a_known_proxy_added_counts_and_nothing_left_of_it() {
        assert_eq!(client("127.0.0.1", "127.0.0.1", &["203.0.113.5"]), "203.0.113.5");
        assert_eq!(client("127.0.0.1", "127.0.0.1", &["1.2.3.4, 203.0.113.5"]), "203.0.113.5");
        assert_eq!(client("127.0.0.1", "127.0.0.1", &["1.2.3.4", "5.6.7.8,203.0.113.5"]), "203.0.113.5");
        // Two known ones in a row, and a client that claims to be one of them.
        assert_eq!(client("127.0.0.1,10.0.0.0/8", "127.0.0.1", &["10.9.9.9, 203.0.113.5, 10.0.0.1"]), "203.0.113.5");
        assert_eq!(client("127.0.0.1,10.0.0.0/8", "127.0.0.1", &["10.9.9.9, 10.0.0.1"]), "10.9.9.9");
    }

    #[test]
    fn what_cannot_be_read_ends_it() {
        for garbage in ["", "unknown", "_hidden", "1.2.3.4, ", "1.2.3.4;5", "203.0.113.5 x"] {
            assert_eq!(client("127.0.0.1", "127.0.0.1", &[garbage]), "127.0.0.1", "{garbage:?}");
        }
    }

    #[test]
    fn addresses_have_several_forms() {
        for (entry, ip) in [
            ("203.0.113.5:4711", "203.0.113.5"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("::ffff:203.0.113.5", "203.0.113.5"),
        ] {
            assert_eq!(client("::1", "::1", &[entry]), ip);
        }
        assert_eq!(client("127.0.0.1", "::ffff:127.0.0.1", &["203.0.113.5"]), "203.0.113.5");
    }

    #[test]
    fn only_networks_are_named() {
        for wrong in ["proxy.example", "10.0.0.0/33", "10.0.0.1:80"] {
            assert!(wrong.parse::<TrustedProxies>().is_err(), "{wrong}");
        }
        let named: TrustedProxies = " 127.0.0.1 , 10.1.0.0/16 ,".parse().unwrap();
        assert_eq!(named.to_string(), "127.0.0.1/32,10.1.0.0/16");
    }
}
