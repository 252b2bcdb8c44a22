//! The listener and connector under gRPC, on real loopback sockets.
// Helpers outside `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]
use futures::{Stream, StreamExt};
use karez_core::key::{PublicKey, SecretKey};
use karez_net::{
    control::{self, ConnectError, ControlStream, PeerInfo},
    tls,
};
use std::{io, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

fn secret(n: u8) -> SecretKey {
    SecretKey::from_bytes(&[n; 32])
}

async fn listen(
    policy: tls::Policy,
) -> (
    SocketAddr,
    impl Stream<Item = io::Result<ControlStream>> + Send + Unpin,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let incoming = control::serve_incoming(listener, &secret(1), policy).unwrap();
    (addr, Box::pin(incoming))
}

#[tokio::test]
async fn a_client_is_known_by_its_key() {
    let (addr, mut incoming) = listen(tls::anyone()).await;
    let key = PublicKey::of(&secret(1));
    let client = tokio::spawn(async move { control::connect(&addr.to_string(), &secret(2), key).await });
    let stream = incoming.next().await.unwrap().unwrap();
    assert_eq!(stream.peer().key, PublicKey::of(&secret(2)));
    client.await.unwrap().unwrap();

    let mut request = tonic::Request::new(());
    assert_eq!(
        control::peer_key_of(&request).unwrap_err().code(),
        tonic::Code::Unauthenticated
    );
    let peer: PeerInfo = stream.peer();
    request.extensions_mut().insert(peer);
    assert_eq!(control::peer_key_of(&request).unwrap(), peer.key);
}

#[tokio::test]
async fn failures_to_connect_say_what_to_check() {
    let (addr, _incoming) = listen(tls::anyone()).await;
    let addr = addr.to_string();
    let wrong = control::connect(&addr, &secret(2), PublicKey::of(&secret(3))).await;
    let expected = ConnectError::WrongKey {
        addr,
        expected: PublicKey::of(&secret(3)),
        got: PublicKey::of(&secret(1)),
    };
    assert_eq!(wrong.unwrap_err(), expected);

    let free = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let refused = control::connect(&free.to_string(), &secret(2), PublicKey::of(&secret(1))).await;
    assert!(
        matches!(refused, Err(ConnectError::Refused { .. })),
        "{refused:?}"
    );

    let nowhere = control::connect("no-such-host.invalid:1", &secret(2), PublicKey::of(&secret(1))).await;
    assert!(
        matches!(nowhere, Err(ConnectError::Unreachable { .. })),
        "{nowhere:?}"
    );

    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = other.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            drop(stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await);
        }
    });
    let ssh = control::connect(&addr.to_string(), &secret(2), PublicKey::of(&secret(1))).await;
    assert!(matches!(ssh, Err(ConnectError::NotKarez { .. })), "{ssh:?}");
}

#[tokio::test]
async fn refused_keys_noise_and_silence_harm_nobody() {
    let friend = PublicKey::of(&secret(2));
    let (addr, mut incoming) = listen(tls::only(friend)).await;
    // More silent connections than one address may have: the rest are dropped at once.
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut over = TcpStream::connect(addr).await.unwrap();
    let mut byte = [0];
    let closed = timeout(Duration::from_secs(2), over.read(&mut byte))
        .await
        .unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)));
    drop(silent);
    tokio::time::sleep(Duration::from_millis(100)).await;

    for noise in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3],
        &[0xff; 70_000],
        b"",
    ] {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        drop(stream.write_all(noise).await);
    }
    let (place, secret3) = (addr.to_string(), secret(3));
    let stranger = control::connect(&place, &secret3, PublicKey::of(&secret(1)));
    // TLS 1.3 lets the client believe it is in until the server's refusal arrives; either way nobody gets in.
    drop(timeout(Duration::from_secs(5), stranger).await.unwrap());

    let own = PublicKey::of(&secret(1));
    let client = tokio::spawn(async move { control::connect(&addr.to_string(), &secret(2), own).await });
    let stream = timeout(Duration::from_secs(5), incoming.next()).await.unwrap();
    assert_eq!(stream.unwrap().unwrap().peer().key, friend);
    client.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_is_dropped_in_a_crowd_comes_back() {
    let (addr, mut incoming) = listen(tls::anyone()).await;
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let own = PublicKey::of(&secret(1));
    let client = tokio::spawn(async move { control::connect(&addr.to_string(), &secret(2), own).await });
    // Dropped once at least.
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(!client.is_finished());
    drop(silent);
    let stream = timeout(Duration::from_secs(5), incoming.next()).await.unwrap();
    assert_eq!(stream.unwrap().unwrap().peer().key, PublicKey::of(&secret(2)));
    client.await.unwrap().unwrap();
}
