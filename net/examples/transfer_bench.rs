//! How fast artifacts move: our transfer against a plain QUIC stream with the same settings and against `cp`.
//!
//! `transfer_bench OUT.json [MIB] [RUNS]` moves MIB (512) on loopback RUNS (3) times each way and writes medians in
//! MiB/s. All processes' work happens on this machine: on two cores the figures are of CPU, not of a network.
use karez_core::{
    key::{PublicKey, SecretKey},
    unit::Bytes,
};
use karez_net::{
    store::ArtifactStore,
    tls,
    transfer::{Holder, Transfers, unwatched},
};
use std::{
    error::Error,
    fs,
    io::Write,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let out = args.get(1).ok_or("usage: transfer_bench OUT.json [MIB] [RUNS]")?;
    let mib: u64 = args.get(2).map_or(Ok(512), |a| a.parse())?;
    let runs: usize = args.get(3).map_or(Ok(3), |a| a.parse())?;
    let dir = std::env::temp_dir().join(format!("karez-transfer-bench-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let measured = measure(&dir, mib, runs).await;
    fs::remove_dir_all(&dir)?;
    let json = measured?;
    fs::write(out, &json)?;
    print!("{json}");
    Ok(())
}

async fn measure(dir: &Path, mib: u64, runs: usize) -> Result<String> {
    let bytes = mib << 20;
    let file = dir.join("file");
    write_noise(&file, bytes)?;
    let (secret_a, secret_b) = (SecretKey::from_bytes(&[1; 32]), SecretKey::from_bytes(&[2; 32]));
    let local: SocketAddr = "127.0.0.1:0".parse()?;
    let room = Bytes(4 * bytes + (64 << 20));
    let store_a = ArtifactStore::open(&dir.join("a"), room)?;
    let started = Instant::now();
    let artifact = store_a.add_file(&file)?;
    let add = rate(bytes, started.elapsed());
    let a = Transfers::bind(local, &secret_a, store_a, Arc::new(|_, _| true))?;
    let holder = Holder {
        key: PublicKey::of(&secret_a),
        addrs: vec![a.local_addr()],
    };
    let (mut ours, mut memory, mut disk, mut cp) = (vec![], vec![], vec![], vec![]);
    for run in 0..runs {
        // Taken in turns, so that a busy moment of the machine hits all of them.
        let store_b = ArtifactStore::open(&dir.join(format!("b{run}")), room)?;
        let b = Transfers::bind(local, &secret_b, store_b, Arc::new(|_, _| false))?;
        let started = Instant::now();
        b.fetch(&[artifact], std::slice::from_ref(&holder), unwatched())
            .await?;
        ours.push(rate(bytes, started.elapsed()));
        b.close().await;
        drop(b);
        fs::remove_dir_all(dir.join(format!("b{run}")))?;

        memory.push(plain(&secret_a, &secret_b, bytes, None).await?);
        let copy = dir.join("copy");
        disk.push(plain(&secret_a, &secret_b, bytes, Some((&file, &copy))).await?);
        fs::remove_file(&copy)?;

        let started = Instant::now();
        let status = std::process::Command::new("cp").arg(&file).arg(&copy).status()?;
        fs::File::open(&copy)?.sync_all()?;
        if !status.success() {
            return Err("cp failed".into());
        }
        cp.push(rate(bytes, started.elapsed()));
        fs::remove_file(&copy)?;
    }
    let (ours, memory, disk, cp) = (median(ours), median(memory), median(disk), median(cp));
    Ok(format!(
        "{{\n  \"mib\": {mib},\n  \"runs\": {runs},\n  \"transfer_mib_s\": {ours:.0},\n  \"plain_quic_memory_mib_s\": {memory:.0},\n  \
         \"plain_quic_disk_mib_s\": {disk:.0},\n  \"cp_sync_mib_s\": {cp:.0},\n  \"add_file_mib_s\": {add:.0},\n  \
         \"transfer_to_plain_memory\": {:.2},\n  \"transfer_to_plain_disk\": {:.2}\n}}\n",
        ours / memory,
        ours / disk
    ))
}

/// One stream, unverified: from memory to nowhere, or from a file to a synced file.
async fn plain(
    server: &SecretKey,
    client: &SecretKey,
    bytes: u64,
    files: Option<(&Path, &Path)>,
) -> Result<f64> {
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window((16u32 << 20).into())
        .receive_window((32u32 << 20).into())
        .send_window(32 << 20);
    let transport = Arc::new(transport);
    let crypto = tls::server(server, tls::ALPN_ARTIFACT, tls::anyone())?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(
        quinn::crypto::rustls::QuicServerConfig::try_from(crypto)?,
    ));
    config.transport_config(transport.clone());
    let endpoint = endpoint(Some(config))?;
    let addr = endpoint.local_addr()?;
    let source = files.map(|(from, _)| from.to_owned());
    let serving = tokio::spawn(async move {
        let connection = endpoint.accept().await.ok_or("closed")?.await?;
        let mut send = connection.open_uni().await?;
        match source {
            Some(path) => {
                let mut file = tokio::fs::File::open(path).await?;
                file.set_max_buf_size(1 << 20);
                tokio::io::copy_buf(&mut tokio::io::BufReader::with_capacity(1 << 20, file), &mut send)
                    .await?;
            }
            None => {
                let block = bytes::Bytes::from(vec![7; 1 << 20]);
                for _ in 0..bytes >> 20 {
                    send.write_chunk(block.clone()).await?;
                }
            }
        }
        send.finish()?;
        send.stopped().await?;
        Result::<()>::Ok(())
    });
    let crypto = tls::client(client, tls::ALPN_ARTIFACT, tls::only(PublicKey::of(server)))?;
    let mut config = quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(
        crypto,
    )?));
    config.transport_config(transport);
    let client = self::endpoint(None)?;
    let started = Instant::now();
    let connection = client.connect_with(config, addr, "karez")?.await?;
    let mut recv = connection.accept_uni().await?;
    match files {
        Some((_, to)) => {
            let mut buffer = vec![0; 1 << 20];
            let mut file = fs::File::create(to)?;
            let mut filled = 0;
            while let Some(n) = recv.read(&mut buffer[filled..]).await? {
                filled += n;
                if filled == buffer.len() {
                    let mut full = std::mem::replace(&mut buffer, vec![0; 1 << 20]);
                    (file, full) = tokio::task::spawn_blocking(move || {
                        file.write_all(&full)?;
                        std::io::Result::Ok((file, full))
                    })
                    .await??;
                    drop(full);
                    filled = 0;
                }
            }
            file.write_all(&buffer[..filled])?;
            file.sync_all()?;
        }
        None => while recv.read_chunk(1 << 20, true).await?.is_some() {},
    }
    let rate = rate(bytes, started.elapsed());
    connection.close(0u32.into(), b"");
    serving.await??;
    Ok(rate)
}

fn endpoint(server: Option<quinn::ServerConfig>) -> Result<quinn::Endpoint> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    socket.set_recv_buffer_size(8 << 20)?;
    socket.set_send_buffer_size(8 << 20)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        server,
        socket.into(),
        runtime,
    )?)
}

fn write_noise(path: &Path, bytes: u64) -> Result<()> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / (1 << 20) as f64 / time.as_secs_f64()
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
