//! Reads the ICMP messages that say that a peer's port is closed. They come from Linux; elsewhere, a peer that ends
//! without a word is noticed by its silence.

use std::io;

/// How often a call is repeated that only reported an earlier packet's error.
const REPEATS_MAX: usize = 3;

/// Returns whether a socket call did not do its work, but reported the error of an earlier packet, perhaps to another
/// peer.
fn is_pending_error(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::ConnectionRefused | Kind::HostUnreachable | Kind::NetworkUnreachable)
}

/// Repeats a socket call that only reported errors of earlier packets.
pub(crate) fn without_pending_errors<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..REPEATS_MAX {
        match call() {
            Err(error) if is_pending_error(&error) => {}
            done => return done,
        }
    }
    call()
}

#[cfg(target_os = "linux")]
pub(crate) use self::linux::{enable, watch};
#[cfg(not(target_os = "linux"))]
pub(crate) use self::nowhere::{enable, watch};

#[cfg(not(target_os = "linux"))]
mod nowhere {
    use std::io;
    use std::net::UdpSocket;
    use std::sync::Arc;

    use tokio_util::sync::CancellationToken;

    use crate::udx::socket::Link;

    pub(crate) fn enable(_: &UdpSocket) -> io::Result<()> {
        Ok(())
    }

    pub(crate) async fn watch(_: Arc<Link>, _: CancellationToken) {}
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{self, IoSliceMut};
    use std::net::{SocketAddrV4, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use nix::cmsg_space;
    use nix::libc::{SO_EE_ORIGIN_ICMP, sock_extended_err, sockaddr_in};
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt};
    use tokio::io::Interest;
    use tokio::task::yield_now;
    use tokio_util::sync::CancellationToken;

    use crate::udx::packet::{self, HEADER_BYTES};
    use crate::udx::socket::Link;

    /// "Destination unreachable: port unreachable" (RFC 792).
    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    /// Space for the kernel's other control messages, such as a timestamp and the interface.
    const OTHER_CONTROL_BYTES: usize = 128;
    /// How many messages are read before other tasks get their turn.
    const TURN: usize = 64;

    /// Makes the kernel queue the ICMP messages about a socket's packets.
    pub(crate) fn enable(io: &UdpSocket) -> io::Result<()> {
        Ok(setsockopt(io, sockopt::Ipv4RecvErr, &true)?)
    }

    /// Reads these messages until `stop`, and tells the streams that they concern.
    pub(crate) async fn watch(link: Arc<Link>, stop: CancellationToken) {
        let mut read = 0;
        while let Some(Ok(_)) = stop.run_until_cancelled(link.io.ready(Interest::ERROR)).await {
            // From here on, the runtime takes the socket for writable at all times.
            link.had_errors.store(true, Ordering::Relaxed);
            while let Ok(closed) = link.io.try_io(Interest::ERROR, || next(&link.io)) {
                if let Some((address, remote_id)) = closed {
                    link.table.port_closed(address, remote_id);
                }
                read += 1;
                if read % TURN == 0 {
                    yield_now().await;
                }
            }
        }
    }

    /// Reads a message. Returns the address and the stream of the packet that it quotes, if it is about a closed port.
    ///
    /// A host that quotes nothing but headers is not believed: whoever knows the ports could send that.
    fn next(io: &impl AsRawFd) -> io::Result<Option<(SocketAddrV4, u32)>> {
        let mut quoted = [0; HEADER_BYTES];
        let mut buffers = [IoSliceMut::new(&mut quoted)];
        let mut control = cmsg_space!(sock_extended_err, sockaddr_in, [u8; OTHER_CONTROL_BYTES]);
        let message = recvmsg::<SockaddrIn>(io.as_raw_fd(), &mut buffers, Some(&mut control), MsgFlags::MSG_ERRQUEUE)?;
        let is_closed_port = message.cmsgs()?.any(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, _) => {
                error.ee_origin == SO_EE_ORIGIN_ICMP && (error.ee_type, error.ee_code) == PORT_UNREACHABLE
            }
            _ => false,
        });
        let (address, length) = (message.address, message.bytes);
        let quoted = &quoted[..length.min(HEADER_BYTES)];
        let about = address.filter(|_| is_closed_port && packet::is_udx(quoted));
        Ok(about.map(SocketAddrV4::from).zip(packet::stream_id(quoted)))
    }
}
