//! How many connections each address has.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

/// How many connections each address has.
type Counts = Arc<Mutex<HashMap<IpAddr, u32>>>;

/// The connections of one listener by address.
#[derive(Debug)]
pub struct Peers {
    most: Option<u32>,
    counts: Counts,
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub struct Place(Option<(IpAddr, Counts)>);

impl Drop for Place {
    fn drop(&mut self) {
        let Some((address, counts)) = &self.0 else { return };
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(address);
            }
        }
    }
}

/// What is counted as one address: in IPv6 a network of 64 bits, which one customer has.
fn counted(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

impl Peers {
    /// At most this many connections from one address; none: any number.
    pub fn new(most: Option<u32>) -> Self {
        Self { most, counts: Arc::default() }
    }

    /// A place for one more connection; none when the address has too many. Without an address it is not counted.
    pub fn enter(&self, ip: Option<IpAddr>) -> Option<Place> {
        let (Some(ip), Some(most)) = (ip, self.most) else { return Some(Place(None)) };
        let address = counted(ip);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Place(Some((address, Arc::clone(&self.counts)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_so_many_places_and_gives_them_back() {
        let peers = Peers::new(Some(2));
        let enter = |ip: &str| peers.enter(Some(ip.parse().unwrap()));
        let (first, second) = (enter("192.0.2.1"), enter("::ffff:192.0.2.1"));
        assert!(first.is_some() && second.is_some() && enter("192.0.2.1").is_none(), "both forms are one address");
        assert!(enter("192.0.2.2").is_some());
        drop(first);
        let third = enter("192.0.2.1");
        assert!(third.is_some() && enter("192.0.2.1").is_none());
        let network = (enter("2001:db8::1"), enter("2001:db8::ffff:1"));
        assert!(network.0.is_some() && network.1.is_some() && enter("2001:db8:0:0:7::").is_none(), "a /64 is one");
        assert!(enter("2001:db8:0:1::1").is_some() && peers.enter(None).is_some());
        drop((second, third, network));
        assert!(peers.counts.lock().unwrap().is_empty());
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let peers = Peers::new(None);
        let places: Vec<_> = (0..10_000).map(|_| peers.enter(Some(IpAddr::from([192, 0, 2, 1])))).collect();
        assert!(places.iter().all(Option::is_some) && peers.counts.lock().unwrap().is_empty());
    }
}
