// Prints the partitioner's hash of keys, as Kafka's own Java client computes it, as JSON.
// Run with the jars of `python -m blueflow.testing.services install kafka` (needs a JDK):
//   java -cp "$HOME/.cache/blueflow/kafka-4.3.1/libs/*" Murmur2Vectors.java > murmur2.json

import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Random;
import org.apache.kafka.common.utils.Utils;

public class Murmur2Vectors {
    private static final int PARTITIONS = 12;

    public static void main(String[] arguments) {
        List<byte[]> keys = new ArrayList<>();
        for (String text : List.of("", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg", "abcdefgh",
                "did:plc:abcdefghijklmnopqrstuvwx", "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
                "did:plc:234567abcdefghijklmnopqr", "did:plc:777777777777777777777777",
                "did:web:example.com", "did:web:a.b.example.org", "did:web:localhost%3A2583",
                "\u00e9", "\u00df\u00fc\u00f1", "\u65e5\u672c\u8a9e", "\ud83e\udd8b",
                "na\u00efve caf\u00e9", "\u043a\u043b\u044e\u0447", "\u0645\u0641\u062a\u0627\u062d")) {
            keys.add(text.getBytes(StandardCharsets.UTF_8));
        }
        String base32 = "abcdefghijklmnopqrstuvwxyz234567";
        Random random = new Random(20261125);
        for (int i = 0; i < 200; i++) {
            StringBuilder did = new StringBuilder("did:plc:");
            for (int j = 0; j < 24; j++) {
                did.append(base32.charAt(random.nextInt(32)));
            }
            keys.add(did.toString().getBytes(StandardCharsets.UTF_8));
        }
        for (int value = 0x80; value <= 0xff; value++) {  // bytes that are negative in Java
            int length = 1 + value % 8;
            byte[] key = new byte[length];
            Arrays.fill(key, (byte) value);
            keys.add(key);
        }
        for (int i = 0; i < 1000; i++) {
            byte[] key = new byte[random.nextInt(301)];
            random.nextBytes(key);
            keys.add(key);
        }
        StringBuilder json = new StringBuilder("[\n");
        for (int i = 0; i < keys.size(); i++) {
            int hash = Utils.murmur2(keys.get(i));
            json.append(String.format(
                "{\"key_hex\": \"%s\", \"hash_signed\": %d, \"partition_of_12\": %d}%s%n",
                HexFormat.of().formatHex(keys.get(i)), hash, Utils.toPositive(hash) % PARTITIONS,
                i + 1 < keys.size() ? "," : ""));
        }
        System.out.print(json.append("]\n"));
    }
}
