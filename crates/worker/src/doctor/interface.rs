//! Which network interface has an address.

use std::net::IpAddr;

use cluster::doctor::Interface;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;

use super::facts::read;

/// The interface that has the first of the addresses that any has. Blocks for a moment.
pub(super) fn interface_of(addresses: &[IpAddr]) -> Option<Interface> {
    let interfaces: Vec<_> = getifaddrs().ok()?.collect();
    let has = |wanted: &IpAddr| {
        let loopback = |flags: InterfaceFlags| flags.contains(InterfaceFlags::IFF_LOOPBACK);
        let exactly = interfaces.iter().find(|found| found.address.as_ref().and_then(ip) == Some(*wanted));
        // All of 127.0.0.0/8 is the loopback interface's, which has one address of it.
        let found = exactly
            .or_else(|| interfaces.iter().find(|found| wanted.is_loopback() && loopback(found.flags)))?;
        let folder = format!("/sys/class/net/{}", found.interface_name);
        Some(Interface {
            name: found.interface_name.clone(),
            mtu: read(&format!("{folder}/mtu")).and_then(|mtu| mtu.parse().ok()).unwrap_or_default(),
            // Virtual ones say -1, or nothing.
            megabits: read(&format!("{folder}/speed"))
                .and_then(|speed| speed.parse().ok())
                .filter(|&s| s > 0),
            loopback: loopback(found.flags),
        })
    };
    addresses.iter().find_map(has)
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_found() {
        let interface = |address: &str| interface_of(&[address.parse().expect("an address")]);
        let found = interface("127.0.0.1").expect("every machine has it");
        assert!(found.loopback && found.mtu >= 1500, "{found:?}");
        assert_eq!(interface("127.1.2.3"), Some(found));
        // TEST-NET-1 of RFC 5737 is nobody's.
        assert_eq!(interface("192.0.2.1"), None);
    }
}
