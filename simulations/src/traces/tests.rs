use super::*;
use std::path::Path;

fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

/// What `read` says of `text`, without the folder.
fn refusal<T: std::fmt::Debug>(
    name: &str,
    text: &str,
    read: impl Fn(&Path) -> Result<T, TraceError>,
) -> String {
    let (folder, path) = file(name, text);
    match read(&path) {
        Ok(read) => format!("read as {read:?}"),
        Err(error) => error
            .to_string()
            .replace(&format!("{}/", folder.path().display()), ""),
    }
}

#[test]
fn market_offers_are_read_for_one_gpu_each() {
    let head = "accelerator,count,total_gpu_mem_mib,price_usd_per_hour,region\n";
    let (_folder, path) = file("m.csv", &format!("{head}RTX3090,4,98304,0.68,CA\n"));
    let offer = market::offers(&path).unwrap().remove(0);
    assert_eq!(
        (offer.gpus, offer.memory_mib, offer.country.as_str()),
        (4, 24_576, "CA")
    );
    assert!((offer.usd - 0.17).abs() < 1e-9);
    for (row, expected) in [
        (
            "H100,0,1,2,US",
            "m.csv, line 2, column count: an offer without a GPU",
        ),
        (
            "H100,1,1,-2,US",
            "m.csv, line 2, column price_usd_per_hour: -2 is not a number of US dollars for an hour from 0 upwards",
        ),
        (
            "H100,1,1,2,us-east",
            "m.csv, line 2, column region: \"us-east\" is not a code of two capital letters",
        ),
    ] {
        assert_eq!(
            refusal("m.csv", &format!("{head}{row}\n"), market::offers),
            expected
        );
    }
}

#[test]
fn inventories_are_read_or_refused_with_file_line_and_column() {
    let head = "sn,cpu_milli,memory_mib,gpu,model\n";
    let (_folder, path) = file(
        "n.csv",
        &format!("{head}a,32000,262144,0,\nb,96000,786432,8,V100M32\n"),
    );
    let nodes = openb::nodes(&path).unwrap();
    assert_eq!(
        (nodes[0].gpus, nodes[1].gpus, nodes[1].model.as_str()),
        (0, 8, "V100M32")
    );
    for (rows, expected) in [
        (
            "a,32,262144,0,\n",
            "n.csv, line 2, column cpu_milli: 32 is under one core: is it in cores, not thousandths?",
        ),
        (
            "a,32000,262144,0,\nb,32000,274877906944,0,\n",
            "n.csv, line 3, column memory_mib: 274877906944 is over 16777216 MiB: is it in another unit than MiB?",
        ),
        (
            "a,32000,262144,-1,\n",
            "n.csv, line 2, column gpu: -1 is not a number of GPUs from 0 upwards",
        ),
        (
            "a,32000,262144,1.5,T4\n",
            "n.csv, line 2, column gpu: 1.5 is not a whole number of GPUs",
        ),
        (
            "a,32000,262144,1000000000,T4\n",
            "n.csv, line 2, column gpu: 1000000000 is over 16 GPUs: is it in another unit than GPUs?",
        ),
        (
            "a,many,262144,0,\n",
            "n.csv, line 2, column cpu_milli: \"many\" is not a number of thousandths of a core",
        ),
        (
            "a,NaN,262144,0,\n",
            "n.csv, line 2, column cpu_milli: NaN is not a number of thousandths of a core from 0 upwards",
        ),
        (
            "a,32000,262144,2,\n",
            "n.csv, line 2, column model: 2 GPUs of model \"\"",
        ),
        (",32000,262144,0,\n", "n.csv, line 2, column sn: is empty"),
        (
            "a,32000,262144\n",
            "n.csv, line 2: has 3 columns, the header has 5",
        ),
        ("", "n.csv, line 1: there are no rows"),
    ] {
        assert_eq!(refusal("n.csv", &format!("{head}{rows}"), openb::nodes), expected);
    }
    assert_eq!(
        refusal(
            "n.csv",
            "sn,cpu_milli,memory_gib,gpu,model\na,1,1,1,T4\n",
            openb::nodes
        ),
        "n.csv, line 1: there is no column \"memory_mib\"; the columns are sn, cpu_milli, memory_gib, gpu, model"
    );
    let absent = openb::nodes(Path::new("/nowhere/n.csv")).unwrap_err().to_string();
    assert!(absent.starts_with("/nowhere/n.csv: "), "{absent}");
}

#[test]
fn jobs_are_read_or_refused() {
    let head = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n";
    let (_folder, path) = file(
        "p.csv",
        &format!("{head}p,6000,12288,1,460,T4|P100,LS,Running,5,90,7.0\nq,1000,1,0,0,,BE,Pending,6,90,\n"),
    );
    let pods = openb::pods(&path).unwrap();
    assert_eq!(pods[0].models, ["T4", "P100"]);
    assert_eq!(
        (pods[0].gpu_milli, pods[0].scheduled_s, pods[1].scheduled_s),
        (460, Some(7), None)
    );
    for (rows, expected) in [
        (
            "p,6000,12288,1,460,,LS,Running,5,4,\n",
            "p.csv, line 2, column deletion_time: 4 lies before its creation at 5",
        ),
        (
            "p,6000,12288,1,460,,LS,Running,5,9,3\n",
            "p.csv, line 2, column scheduled_time: lies before its creation",
        ),
        (
            "p,6000,12288,1,2000,,LS,Running,5,9,\n",
            "p.csv, line 2, column gpu_milli: 2000 is over 1000 thousandths of a GPU: is it in another unit than thousandths of a GPU?",
        ),
        (
            "p,6000,12288,1,0,,LS,Running,5,9,\n",
            "p.csv, line 2, column gpu_milli: 1 GPUs of 0 thousandths each",
        ),
        (
            "p,6000,1,0,0,,LS,Running,5,9,\nq,6000,1,0,0,,LS,Running,4,9,\n",
            "p.csv, line 3, column creation_time: 4 is earlier than the row before, 5",
        ),
        (
            "p,6000,1,0,0,,LS,Running,1700000000000,1700000000001,\n",
            "p.csv, line 2, column creation_time: 1700000000000 is over 316224000 seconds: is it in another unit than seconds?",
        ),
    ] {
        assert_eq!(refusal("p.csv", &format!("{head}{rows}"), openb::pods), expected);
    }
}

#[test]
fn requests_are_read_or_refused() {
    let head = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
    let (_folder, path) = file(
        "r.csv",
        &format!("{head}2023-11-16 23:59:59.5000000,374,44\n2023-11-17 00:00:01.0000000,396,109\n"),
    );
    let requests = azure::requests(&path).unwrap();
    assert_eq!((requests[1].at_ms, requests[1].generated_tokens), (1_500, 109));
    for (rows, expected) in [
        (
            "1700158546,374,44\n",
            "r.csv, line 2, column TIMESTAMP: \"1700158546\" is not a time like 2023-11-16 18:15:46.6805900",
        ),
        (
            "2023-13-16 18:15:46,374,44\n",
            "r.csv, line 2, column TIMESTAMP: \"2023-13-16 18:15:46\" is not a time like 2023-11-16 18:15:46.6805900",
        ),
        (
            "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:45,1,1\n",
            "r.csv, line 3, column TIMESTAMP: 2023-11-16 18:15:45 is earlier than the row before",
        ),
        (
            "2023-11-16 18:15:46,0,44\n",
            "r.csv, line 2, column ContextTokens: a request without a prompt",
        ),
        (
            "2023-11-16 18:15:46,9,99999999\n",
            "r.csv, line 2, column GeneratedTokens: 99999999 is over 10000000 tokens: is it in another unit than tokens?",
        ),
    ] {
        assert_eq!(
            refusal("r.csv", &format!("{head}{rows}"), azure::requests),
            expected
        );
    }
    assert!(
        refusal("r.csv", "TIMESTAMP,ContextTokens\nx,1\n", azure::requests)
            .contains("no column \"GeneratedTokens\"")
    );
}

#[test]
fn availability_is_read_or_refused() {
    let (_folder, path) = file(
        "s.json",
        r#"{"metadata": {"gap_seconds": 195}, "data": [1, 1, 0, 1]}"#,
    );
    let spot = availability::spot(&path).unwrap();
    assert!(
        spot.at(194) && spot.at(389) && !spot.at(390) && spot.at(780),
        "{spot:?}"
    );
    assert_eq!(spot.per_mille(), 750);
    for (text, expected) in [
        (
            r#"{"metadata": {"gap_seconds": 195000}, "data": [1]}"#,
            "s.json, line 1, column metadata.gap_seconds: 195000 is not a number of seconds from 1 to 86400: is it in another unit?",
        ),
        (
            r#"{"metadata": {}, "data": [1]}"#,
            "s.json, line 1, column metadata.gap_seconds: null is not a number of seconds from 1 to 86400: is it in another unit?",
        ),
        (
            r#"{"metadata": {"gap_seconds": 195}, "data": [1, 0.5]}"#,
            "s.json, line 1, column data[1]: 0.5 is neither 0 nor 1",
        ),
        (
            r#"{"metadata": {"gap_seconds": 195}}"#,
            "s.json, line 1, column data: is missing, or no list with a value in it",
        ),
        (
            "{\n \"metadata\": {",
            "s.json, line 2: is no JSON: EOF while parsing an object at line 2 column 14",
        ),
    ] {
        assert_eq!(refusal("s.json", text, availability::spot), expected);
    }
}

#[test]
fn latencies_are_read_or_refused_compressed_or_not() {
    let head = "cty1,cty2,rtt_cnt,rtt_avg,rtt_std,rtt_min,rtt_max\n";
    let text = format!("{head}AD,AT,3,37.5,0.1,37.4,37.6\nBR,KE,1,350,,0,9\n");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("l.csv.gz");
    let mut gz =
        flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, text.as_bytes()).unwrap();
    gz.finish().unwrap();
    let (_folder, plain) = file("l.csv", &text);
    let trips = latency::round_trips(&path).unwrap();
    assert_eq!(trips, latency::round_trips(&plain).unwrap());
    assert_eq!((trips[1].mean_ms, trips[1].deviation_ms), (350.0, None));
    for (rows, expected) in [
        (
            "AD,AT,3,37500,0.1,1,1\n",
            "l.csv, line 2, column rtt_avg: 37500 is over 5000 milliseconds: is it in another unit than milliseconds?",
        ),
        (
            "AD,AT,3,0,0.1,1,1\n",
            "l.csv, line 2, column rtt_avg: no message arrives in no time",
        ),
        (
            "AND,AT,3,1,0.1,1,1\n",
            "l.csv, line 2, column cty1: \"AND\" is not a code of two capital letters",
        ),
        (
            "AD,AT,3,inf,0.1,1,1\n",
            "l.csv, line 2, column rtt_avg: inf is not a number of milliseconds from 0 upwards",
        ),
    ] {
        assert_eq!(
            refusal("l.csv", &format!("{head}{rows}"), latency::round_trips),
            expected
        );
    }
    assert!(refusal("l.csv.gz", "not compressed", latency::round_trips).starts_with("l.csv.gz: "));
}

#[test]
fn energy_is_read_or_refused() {
    let head = "iso3,price_eur_kwh,price_usd_kwh,consumption_band,source\n";
    let (_folder, path) = file("e.csv", &format!("{head}KEN,0.1,0.2,research,\"a, b\"\n"));
    assert_eq!(energy::electricity(&path).unwrap()["KEN"], 0.2);
    for (rows, expected) in [
        (
            "KEN,1,20,r,s\n",
            "e.csv, line 2, column price_usd_kwh: 20 is over 3 US dollars for a kilowatt-hour: is it in another unit than US dollars for a kilowatt-hour?",
        ),
        (
            "KEN,1,-0.2,r,s\n",
            "e.csv, line 2, column price_usd_kwh: -0.2 is not a number of US dollars for a kilowatt-hour from 0 upwards",
        ),
        (
            "KE,1,0.2,r,s\n",
            "e.csv, line 2, column iso3: \"KE\" is not a code of three capital letters",
        ),
        (
            "KEN,1,0.2,r,s\nKEN,1,0.2,r,s\n",
            "e.csv, line 3, column iso3: KEN is there twice",
        ),
    ] {
        assert_eq!(
            refusal("e.csv", &format!("{head}{rows}"), energy::electricity),
            expected
        );
    }
    let (_folder, path) = file(
        "c.json",
        r#"{"KEN": {"carbon_intensity": 70.5}, "PRY": {"carbon_intensity": 24}}"#,
    );
    assert_eq!(energy::carbon(&path).unwrap()["KEN"], 70.5);
    for (text, expected) in [
        (
            "{\n\"KEN\": {\"carbon_intensity\": 0.07}}",
            "c.json, line 2, column KEN.carbon_intensity: 0.07 g/kWh is not possible: is it in another unit than grams?",
        ),
        (
            "{\"KEN\": {\"carbon_intensity\": 70500}}",
            "c.json, line 1, column KEN.carbon_intensity: 70500 g/kWh is not possible: is it in another unit than grams?",
        ),
        (
            "{\"KEN\": {\"intensity\": 70}}",
            "c.json, line 1, column KEN.carbon_intensity: null is not a number of g/kWh",
        ),
        (
            "{\"Kenya\": {}}",
            "c.json, line 1, column Kenya: is not a code of three capital letters",
        ),
        ("[]", "c.json, line 1: is no object with a country each"),
        ("{}", "c.json, line 1: there is no country in it"),
    ] {
        assert_eq!(refusal("c.json", text, energy::carbon), expected);
    }
}

/// With `KAREZ_DATA` naming a data folder, the published files themselves must be readable.
#[test]
fn published_traces_are_readable() {
    let Some(data) = std::env::var_os("KAREZ_DATA") else {
        println!("skipped: KAREZ_DATA names no data folder");
        return;
    };
    let data = Folder::new(data);
    assert_eq!(openb::nodes(&data.openb_nodes()).unwrap().len(), 1_523);
    assert_eq!(openb::pods(&data.openb_pods()).unwrap().len(), 8_152);
    assert!(
        openb::pods(&data.openb_pods_gpuspec33())
            .unwrap()
            .iter()
            .any(|p| p.models.len() > 1)
    );
    assert_eq!(azure::requests(&data.azure_llm()).unwrap().len(), 19_366);
    for zone in ["us-east-1a", "us-east-1c", "us-west-2b"] {
        assert_eq!(availability::spot(&data.spot(zone)).unwrap().gap_s, 195);
    }
    assert!(energy::electricity(&data.electricity()).unwrap().len() > 50);
    assert!(energy::carbon(&data.carbon()).unwrap().len() > 200);
    let links = crate::geo::Links::measured(latency::round_trips(&data.latency()).unwrap());
    assert!(links.pairs() > 6_000);
}
